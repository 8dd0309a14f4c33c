-- Results: one row per event of `predictions.v1`, whose own id is the identity. The first stored wins.

CREATE EXTENSION IF NOT EXISTS vector;

CREATE TABLE predictions (
    prediction_id text COLLATE "C" PRIMARY KEY CHECK (length(prediction_id) BETWEEN 1 AND 128),
    -- Order of storing, for paging: rows of one transaction share `stored_at`.
    position      bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    image_id      text COLLATE "C" NOT NULL CHECK (length(image_id) BETWEEN 1 AND 512),
    deployment    text        NOT NULL CHECK (length(deployment) BETWEEN 1 AND 255),
    lane          text        NOT NULL CHECK (lane IN ('realtime', 'bulk')),
    outcome       text        NOT NULL CHECK (outcome IN ('predicted', 'expired')),
    -- Without embeddings, which have a table of their own.
    models        jsonb       NOT NULL CHECK (jsonb_typeof(models) = 'array'),
    receipt       jsonb       NOT NULL CHECK (jsonb_typeof(receipt) = 'object'),
    input_sha256  text CHECK (input_sha256 ~ '^[0-9a-f]{64}$'),
    reason        text CHECK (length(reason) <= 10000),
    traceparent   text CHECK (length(traceparent) <= 255),
    predicted_at  timestamptz NOT NULL,
    stored_at     timestamptz NOT NULL DEFAULT now(),
    CHECK (outcome = 'predicted' OR models = '[]')
);

CREATE INDEX predictions_by_image ON predictions (image_id);
CREATE INDEX predictions_by_age ON predictions (stored_at);

-- Vectors of different models have different lengths, so each model that is searched gets an index of its own
-- on an expression: ((embedding::vector(N))) WHERE model = '...'.
CREATE TABLE embeddings (
    prediction_id text COLLATE "C" NOT NULL REFERENCES predictions ON DELETE CASCADE,
    model         text    NOT NULL CHECK (length(model) BETWEEN 1 AND 512),
    dimension     integer NOT NULL,
    embedding     vector  NOT NULL,
    PRIMARY KEY (prediction_id, model),
    CHECK (dimension = vector_dims(embedding))
);
