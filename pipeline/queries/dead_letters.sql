-- name: save_dead_letters
-- Insert dead letters; one that is there already stays as it is, redriven or not.
INSERT INTO dead_letters (consumer_group, topic, partition, "offset", timestamp_ms, image_id, code, reason,
                          attempts, key, value, value_ref, headers, failed_at)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], $7::text[],
                     $8::text[], $9::integer[], $10::bytea[], $11::bytea[], $12::text[], $13::json[],
                     $14::timestamptz[])
    AS new (consumer_group, topic, partition, "offset", timestamp_ms, image_id, code, reason,
            attempts, key, value, value_ref, headers, failed_at)
WHERE NOT EXISTS (SELECT FROM deleted_images AS deleted
                  WHERE deleted.image_id = new.image_id
                    AND new.timestamp_ms <= extract(epoch FROM deleted.deleted_at) * 1000)
-- One order for all writers: they wait for each other and never deadlock.
ORDER BY consumer_group, topic, partition, "offset", timestamp_ms
ON CONFLICT (consumer_group, topic, partition, "offset", timestamp_ms) DO NOTHING
RETURNING id

-- name: dead_letters
-- A page of dead letters without their values, newest first; every filter may be null.
SELECT id, consumer_group, topic, partition, "offset", timestamp_ms, image_id, code, reason, attempts, key,
       NULL::bytea AS value, length(value) AS value_bytes, value_ref, headers, failed_at, stored_at, redriven_at
FROM dead_letters
WHERE ($2::bigint IS NULL OR id < $2)
  AND ($3::text IS NULL OR code = $3)
  AND ($4::text IS NULL OR consumer_group = $4)
  AND ($5::text IS NULL OR topic = $5)
  AND ($6::text IS NULL OR image_id = $6)
  AND (NOT $7::boolean OR redriven_at IS NULL)
ORDER BY id DESC LIMIT $1

-- name: dead_letter
-- One dead letter with its value.
SELECT id, consumer_group, topic, partition, "offset", timestamp_ms, image_id, code, reason, attempts, key,
       value, length(value) AS value_bytes, value_ref, headers, failed_at, stored_at, redriven_at
FROM dead_letters WHERE id = $1

-- name: mark_redriven
-- Close a dead letter that was published again; no row if it was closed before.
UPDATE dead_letters SET redriven_at = now() WHERE id = $1 AND redriven_at IS NULL RETURNING id
