-- name: save_images
-- Insert images; fill in what the first writer of the same picture did not know.
INSERT INTO images AS old (image_id, lane, topic, partition, "offset", published_at, sha256, size_bytes,
                           content_type, object_key, source, expires_at)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::integer[], $5::bigint[], $6::timestamptz[],
                     $7::text[], $8::bigint[], $9::text[], $10::text[], $11::text[], $12::timestamptz[])
    AS new (image_id, lane, topic, partition, "offset", published_at, sha256, size_bytes,
            content_type, object_key, source, expires_at)
WHERE NOT EXISTS (SELECT FROM deleted_images AS deleted
                  WHERE deleted.image_id = new.image_id AND new.published_at <= deleted.deleted_at)
-- One order for all writers: they wait for each other and never deadlock.
ORDER BY new.image_id
ON CONFLICT (image_id) DO UPDATE SET
    sha256 = coalesce(old.sha256, excluded.sha256),
    size_bytes = coalesce(old.size_bytes, excluded.size_bytes),
    content_type = coalesce(old.content_type, excluded.content_type),
    object_key = coalesce(old.object_key, excluded.object_key)
WHERE (old.sha256 = excluded.sha256) IS NOT FALSE
  AND (old.sha256 = excluded.sha256 OR (old.object_key = excluded.object_key) IS NOT FALSE)
  AND (old.sha256 IS NULL AND excluded.sha256 IS NOT NULL
       OR old.object_key IS NULL AND excluded.object_key IS NOT NULL)
RETURNING image_id, xmax = 0 AS inserted

-- name: images
-- Look images up by id.
SELECT image_id, lane, topic, partition, "offset", published_at, sha256, size_bytes, content_type, object_key,
       source, expires_at
FROM images WHERE image_id = ANY($1::text[])

-- name: image_state
-- An image's state in deployment $2, whose dead letters are those of groups $3: the first fact that holds.
SELECT fact, code, reason, id FROM (
    SELECT 1 AS rank, 'predicted' AS fact, NULL AS code, NULL AS reason, NULL::bigint AS id
    WHERE EXISTS (SELECT FROM predictions WHERE image_id = $1 AND deployment = $2 AND outcome = 'predicted')
    UNION ALL
    (SELECT 2, 'dead_lettered', code, reason, id FROM dead_letters
     WHERE image_id = $1 AND consumer_group = ANY($3::text[]) AND redriven_at IS NULL
     ORDER BY id DESC LIMIT 1)
    UNION ALL
    (SELECT 3, 'expired', 'expired', reason, NULL FROM predictions
     WHERE image_id = $1 AND deployment = $2 AND outcome = 'expired'
     ORDER BY position DESC LIMIT 1)
    UNION ALL
    SELECT 4, 'accepted', NULL, NULL, NULL
    WHERE EXISTS (SELECT FROM images WHERE image_id = $1)
       OR EXISTS (SELECT FROM predictions WHERE image_id = $1)
       OR EXISTS (SELECT FROM dead_letters WHERE image_id = $1)
) AS facts ORDER BY rank LIMIT 1
