-- name: traced_image
-- What is stored of an image itself, and whether a person deleted it.
SELECT images.lane, images.topic, images.partition, images."offset", published_at, size_bytes, source, object_key,
       stored_at, deleted_at
FROM (SELECT $1::text AS image_id) AS asked
LEFT JOIN images USING (image_id)
LEFT JOIN deleted_images USING (image_id)

-- name: companions
-- Up to $3 of the images that rode in batch $1 of deployment $2.
SELECT image_id
FROM predictions WHERE receipt ? 'batch_id' AND receipt->>'batch_id' = $1 AND deployment = $2
ORDER BY image_id LIMIT $3
