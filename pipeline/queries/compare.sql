-- name: compare_results
-- What deployment $1 has of its images, the latest stored first, with what deployment $3 has of the same images: the
-- newest result, or the newest of one revision ($2, $4). $5 is the consumer group of $3.
SELECT one.image_id, one.stored_at, one.prediction_id, one.outcome, one.models, one.receipt,
       other.prediction_id AS other_id, other.models AS other_models, other.receipt AS other_receipt,
       coalesce(other.outcome, dead.state, 'absent') AS other_outcome
FROM predictions AS one
LEFT JOIN LATERAL (
    SELECT prediction_id, outcome, models, receipt FROM predictions
    WHERE image_id = one.image_id AND deployment = $3 AND ($4::bigint IS NULL OR revision = $4)
    ORDER BY outcome = 'predicted' DESC, revision DESC, position DESC LIMIT 1) AS other ON true
LEFT JOIN LATERAL (
    SELECT 'dead_lettered' AS state FROM dead_letters
    WHERE other.prediction_id IS NULL AND image_id = one.image_id AND consumer_group = $5 AND redriven_at IS NULL
    LIMIT 1) AS dead ON true
WHERE one.deployment = $1 AND ($2::bigint IS NULL OR one.revision = $2)
  AND one.stored_at >= coalesce($6::timestamptz, '-infinity')
  AND NOT EXISTS (SELECT FROM predictions AS newer
                  WHERE newer.image_id = one.image_id AND newer.deployment = one.deployment
                    AND ($2::bigint IS NULL OR newer.revision = $2)
                    AND (newer.outcome = 'predicted', newer.revision, newer.position)
                      > (one.outcome = 'predicted', one.revision, one.position))
ORDER BY one.stored_at DESC LIMIT $7

-- name: compare_absences
-- The same images without their results, and whether deployment $3 has one.
SELECT one.outcome, other.there IS NOT NULL AS is_shared, coalesce(dead.state, 'absent') AS other_outcome
FROM predictions AS one
LEFT JOIN LATERAL (
    SELECT true AS there FROM predictions
    WHERE image_id = one.image_id AND deployment = $3 AND ($4::bigint IS NULL OR revision = $4) LIMIT 1) AS other ON true
LEFT JOIN LATERAL (
    SELECT 'dead_lettered' AS state FROM dead_letters
    WHERE other.there IS NULL AND image_id = one.image_id AND consumer_group = $5 AND redriven_at IS NULL
    LIMIT 1) AS dead ON true
WHERE one.deployment = $1 AND ($2::bigint IS NULL OR one.revision = $2)
  AND one.stored_at >= coalesce($6::timestamptz, '-infinity')
  AND NOT EXISTS (SELECT FROM predictions AS newer
                  WHERE newer.image_id = one.image_id AND newer.deployment = one.deployment
                    AND ($2::bigint IS NULL OR newer.revision = $2)
                    AND (newer.outcome = 'predicted', newer.revision, newer.position)
                      > (one.outcome = 'predicted', one.revision, one.position))

-- name: compare_vectors
-- The cosine between two vectors each; null where their lengths differ, NaN where one is nothing but zeros.
SELECT pair.number - 1 AS number,
       CASE WHEN one.dimension = other.dimension THEN 1 - (one.embedding <=> other.embedding) END AS cosine
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) WITH ORDINALITY
    AS pair (one_id, one_model, other_id, other_model, number)
JOIN embeddings AS one ON one.prediction_id = pair.one_id AND one.model = pair.one_model
JOIN embeddings AS other ON other.prediction_id = pair.other_id AND other.model = pair.other_model
