-- The history of `models.v1`, which itself keeps only the latest record of each key, and which result is the newest.

CREATE TABLE model_versions (
    deployment    text        NOT NULL CHECK (length(deployment) BETWEEN 1 AND 255),
    revision      bigint      NOT NULL CHECK (revision >= 0),
    -- Part of the identity: a topic that was made anew counts its revisions from 1 again.
    activated_at  timestamptz NOT NULL,
    activated_by  text        NOT NULL CHECK (length(activated_by) <= 500),
    -- [specification, ...] and [{"name", "sha256", "size_bytes"}, ...]
    models        jsonb       NOT NULL CHECK (jsonb_typeof(models) = 'array'),
    artefacts     jsonb       NOT NULL CHECK (jsonb_typeof(artefacts) = 'array'),
    -- The revision that a replica falls back to; null is what MILLRACE_MODELS says.
    predecessor   bigint,
    note          text CHECK (length(note) <= 500),
    stored_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (deployment, revision, activated_at)
);

-- What came of a version on each replica. Reports repeat every few seconds; only what changed is a row.
CREATE TABLE model_reports (
    deployment  text        NOT NULL CHECK (length(deployment) BETWEEN 1 AND 255),
    revision    bigint      NOT NULL CHECK (revision >= 0),
    replica     text        NOT NULL CHECK (length(replica) BETWEEN 1 AND 255),
    state       text        NOT NULL CHECK (state IN ('runs', 'refused')),
    -- Since when it runs, or when it was refused.
    since       timestamptz NOT NULL,
    -- [{"model", "version", "digest", "task"}, ...]; empty when refused.
    models      jsonb       NOT NULL CHECK (jsonb_typeof(models) = 'array'),
    reason      text CHECK (length(reason) <= 500),
    stored_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (deployment, revision, replica, state, since)
);

-- Of several predictions of an image in a deployment, the one of the highest revision is shown.
ALTER TABLE predictions ADD COLUMN revision bigint NOT NULL DEFAULT 0 CHECK (revision >= 0);

-- One result per image and deployment: what is shown unless somebody asks for all. `predicted` before `expired`,
-- then the newest revision, then the latest.
CREATE VIEW newest_predictions AS
SELECT DISTINCT ON (image_id, deployment) *
FROM predictions
ORDER BY image_id, deployment, outcome = 'predicted' DESC, revision DESC, position DESC;
