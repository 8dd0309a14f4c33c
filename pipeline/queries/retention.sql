-- name: writers_share
-- Taken by everything that inserts, so that a deletion sees all that was inserted before it.
SELECT pg_advisory_xact_lock_shared($1)

-- name: deletion_alone
-- Wait for running writers and hold new ones back until this transaction ends.
SELECT pg_advisory_xact_lock($1)

-- name: delete_image
-- Leave a tombstone, delete everything of one image and queue its objects; counts rows, returns the objects.
WITH known AS (
    SELECT count(*) AS rows FROM (
        SELECT FROM images WHERE image_id = $1
        UNION ALL SELECT FROM predictions WHERE image_id = $1
        UNION ALL SELECT FROM dead_letters WHERE image_id = $1) AS everything
), tombstone AS (
    INSERT INTO deleted_images (image_id, topic, partition, "offset")
    SELECT $1, topic, partition, "offset" FROM known LEFT JOIN images ON image_id = $1 WHERE rows > 0
    ON CONFLICT (image_id) DO UPDATE SET deleted_at = excluded.deleted_at,
        topic = coalesce(excluded.topic, deleted_images.topic),
        partition = coalesce(excluded.partition, deleted_images.partition),
        "offset" = coalesce(excluded."offset", deleted_images."offset")
), image AS (
    DELETE FROM images WHERE image_id = $1 RETURNING image_id, object_key
), results AS (
    DELETE FROM predictions WHERE image_id = $1
), letters AS (
    DELETE FROM dead_letters WHERE image_id = $1 RETURNING value_ref
), queued AS (
    INSERT INTO object_deletions (object_key)
    SELECT object_key FROM image WHERE owns_object(image_id, object_key)
    UNION SELECT value_ref FROM letters WHERE value_ref ~ '^dead-letters/[0-9a-f]{2}/[0-9a-f]{64}$'
    ON CONFLICT (object_key) DO UPDATE SET queued_at = excluded.queued_at
    RETURNING object_key
)
SELECT rows, ARRAY(SELECT object_key FROM queued) AS object_keys FROM known

-- name: count_expired
-- Count what was stored before $1.
SELECT (SELECT count(*) FROM images WHERE stored_at < $1) AS images,
    (SELECT count(*) FROM predictions WHERE stored_at < $1) AS predictions,
    (SELECT count(*) FROM dead_letters WHERE stored_at < $1) AS dead_letters

-- name: expire_images
-- Delete up to $2 images stored before $1 and queue their objects.
WITH old AS (
    SELECT image_id FROM images WHERE stored_at < $1 ORDER BY stored_at LIMIT $2 FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM images USING old WHERE images.image_id = old.image_id
    RETURNING images.image_id, images.object_key
), queued AS (
    INSERT INTO object_deletions (object_key)
    SELECT DISTINCT object_key FROM deleted WHERE owns_object(image_id, object_key)
    ON CONFLICT (object_key) DO UPDATE SET queued_at = excluded.queued_at
    RETURNING object_key
)
SELECT (SELECT count(*) FROM deleted) AS rows, ARRAY(SELECT object_key FROM queued) AS object_keys

-- name: expire_predictions
-- Delete up to $2 predictions stored before $1; their embeddings go with them.
WITH old AS (
    SELECT prediction_id FROM predictions WHERE stored_at < $1 ORDER BY stored_at LIMIT $2 FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM predictions USING old WHERE predictions.prediction_id = old.prediction_id RETURNING 1
)
SELECT count(*) AS rows, ARRAY[]::text[] AS object_keys FROM deleted

-- name: expire_dead_letters
-- Delete up to $2 dead letters stored before $1 and queue the values that were too large for Kafka.
WITH old AS (
    SELECT id FROM dead_letters WHERE stored_at < $1 ORDER BY stored_at LIMIT $2 FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM dead_letters USING old WHERE dead_letters.id = old.id RETURNING dead_letters.value_ref
), queued AS (
    INSERT INTO object_deletions (object_key)
    SELECT DISTINCT value_ref FROM deleted WHERE value_ref ~ '^dead-letters/[0-9a-f]{2}/[0-9a-f]{64}$'
    ON CONFLICT (object_key) DO UPDATE SET queued_at = excluded.queued_at
    RETURNING object_key
)
SELECT (SELECT count(*) FROM deleted) AS rows, ARRAY(SELECT object_key FROM queued) AS object_keys

-- name: expire_tombstones
-- Forget up to $2 deletions from before $1: what they hold back has left Kafka by then.
DELETE FROM deleted_images WHERE image_id IN
    (SELECT image_id FROM deleted_images WHERE deleted_at < $1 ORDER BY deleted_at LIMIT $2)

-- name: unqueue_objects
-- Take objects off the queue whose image was stored again since.
DELETE FROM object_deletions USING images WHERE images.object_key = object_deletions.object_key

-- name: queued_objects
-- Objects to delete, oldest first.
SELECT object_key FROM object_deletions ORDER BY queued_at, object_key LIMIT $1

-- name: forget_objects
-- Take objects off the queue that are gone.
DELETE FROM object_deletions WHERE object_key = ANY($1::text[])

-- name: objects_in_use
-- Which of these objects an image or a dead letter needs.
SELECT object_key FROM images WHERE object_key = ANY($1::text[])
UNION
SELECT value_ref FROM dead_letters WHERE value_ref = ANY($1::text[])
