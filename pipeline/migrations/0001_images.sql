-- Images, one row per event id: where the record is, whose picture it was, where its bytes are kept.
-- Written by `archive` and, best effort, by the gateway; the first picture of an id wins.

-- Identifiers sort by bytes: faster, searchable by prefix, and safe when the server's locales change.
CREATE TABLE images (
    image_id     text COLLATE "C" PRIMARY KEY CHECK (length(image_id) BETWEEN 1 AND 512),
    lane         text        NOT NULL CHECK (lane IN ('realtime', 'bulk')),
    topic        text        NOT NULL CHECK (length(topic) <= 255),
    partition    integer     NOT NULL CHECK (partition >= 0),
    "offset"     bigint      NOT NULL CHECK ("offset" >= 0),
    published_at timestamptz NOT NULL,
    sha256       text CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    size_bytes   bigint CHECK (size_bytes >= 0),
    content_type text CHECK (length(content_type) <= 255),
    -- Null until the object is really there.
    object_key   text CHECK (length(object_key) BETWEEN 1 AND 512),
    source       text        NOT NULL CHECK (length(source) <= 2048),
    expires_at   timestamptz,
    stored_at    timestamptz NOT NULL DEFAULT now()
);

-- Retention deletes by our own clock: publishers' clocks may be years off.
CREATE INDEX images_by_age ON images (stored_at);
CREATE INDEX images_by_object ON images (object_key) WHERE object_key IS NOT NULL;

-- Ids a person had deleted: what was published before must not come back when it is stored late.
CREATE TABLE deleted_images (
    image_id   text COLLATE "C" PRIMARY KEY,
    deleted_at timestamptz NOT NULL DEFAULT now(),
    -- The record's place, where it was known: its predictions name it, however late they are made.
    topic      text,
    partition  integer,
    "offset"   bigint
);

CREATE INDEX deleted_images_by_age ON deleted_images (deleted_at);

-- Objects to delete, queued in the transaction that deletes their rows, so that a crash in between leaks none.
CREATE TABLE object_deletions (
    object_key text PRIMARY KEY CHECK (length(object_key) BETWEEN 1 AND 512),
    queued_at  timestamptz NOT NULL DEFAULT now()
);

-- Whether Millrace put this object there for this image (`pipeline.objects.image_key`). Others' objects that a
-- `ce_dataref` points to are never deleted.
CREATE FUNCTION owns_object(image_id text, object_key text) RETURNS boolean
    IMMUTABLE PARALLEL SAFE
    LANGUAGE sql AS $$
    SELECT starts_with(object_key, 'images/' || left(digest, 2) || '/' || digest || '/')
    FROM encode(sha256(convert_to(image_id, 'UTF8')), 'hex') AS digest
$$;
