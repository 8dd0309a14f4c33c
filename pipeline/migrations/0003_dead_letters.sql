-- Dead letters: the record that a consumer group could not finish, as it was, and why. Redriving one publishes it
-- again from here.

CREATE TABLE dead_letters (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer_group text        NOT NULL CHECK (length(consumer_group) <= 255),
    topic          text        NOT NULL CHECK (length(topic) <= 255),
    partition      bigint      NOT NULL CHECK (partition >= 0),
    "offset"       bigint      NOT NULL CHECK ("offset" >= 0),
    -- Part of the identity: a topic that was made anew counts its offsets from 0 again.
    timestamp_ms   bigint      NOT NULL,
    image_id       text COLLATE "C" CHECK (length(image_id) BETWEEN 1 AND 512),
    code           text        NOT NULL CHECK (length(code) <= 255),
    reason         text        NOT NULL CHECK (length(reason) <= 10000),
    attempts       integer     NOT NULL CHECK (attempts >= 1),
    key            bytea,
    value          bytea,
    value_ref      text CHECK (length(value_ref) <= 512),
    -- [[name, base64 of the value], ...]: json, not jsonb, because a header's name may hold U+0000.
    headers        json        NOT NULL CHECK (json_typeof(headers) = 'array'),
    failed_at      timestamptz NOT NULL,
    stored_at      timestamptz NOT NULL DEFAULT now(),
    redriven_at    timestamptz,
    UNIQUE (consumer_group, topic, partition, "offset", timestamp_ms)
);

CREATE INDEX dead_letters_by_image ON dead_letters (image_id) WHERE image_id IS NOT NULL;
CREATE INDEX dead_letters_by_age ON dead_letters (stored_at);
CREATE INDEX open_dead_letters_by_code ON dead_letters (code, id) WHERE redriven_at IS NULL;
CREATE INDEX open_dead_letters_by_origin ON dead_letters (topic, consumer_group, id) WHERE redriven_at IS NULL;
