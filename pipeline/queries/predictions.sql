-- name: save_predictions
-- Insert predictions; the first stored wins, but `predicted` replaces `expired`.
INSERT INTO predictions AS old (prediction_id, image_id, deployment, lane, outcome, models, receipt, input_sha256,
                                reason, traceparent, predicted_at, revision, published_at)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::jsonb[], $7::jsonb[],
                     $8::text[], $9::text[], $10::text[], $11::timestamptz[], $12::bigint[], $13::timestamptz[])
    AS new (prediction_id, image_id, deployment, lane, outcome, models, receipt, input_sha256,
            reason, traceparent, predicted_at, revision, published_at)
-- Late is what was made before the deletion, or made later from the very record that was deleted.
WHERE NOT EXISTS (SELECT FROM deleted_images AS deleted
                  WHERE deleted.image_id = new.image_id
                    AND (new.predicted_at <= deleted.deleted_at
                         OR (new.receipt->>'topic', new.receipt->>'partition', new.receipt->>'offset')
                          = (deleted.topic, deleted.partition::text, deleted."offset"::text)))
-- One order for all writers: they wait for each other and never deadlock.
ORDER BY new.prediction_id
ON CONFLICT (prediction_id) DO UPDATE SET
    outcome = excluded.outcome,
    models = excluded.models,
    receipt = excluded.receipt,
    input_sha256 = excluded.input_sha256,
    reason = excluded.reason,
    traceparent = excluded.traceparent,
    predicted_at = excluded.predicted_at,
    published_at = excluded.published_at,
    revision = greatest(old.revision, excluded.revision)
WHERE old.outcome = 'expired' AND excluded.outcome = 'predicted'
  AND old.image_id = excluded.image_id AND old.deployment = excluded.deployment
  AND (old.input_sha256 = excluded.input_sha256) IS NOT FALSE
RETURNING prediction_id

-- name: save_embeddings
-- Insert the vectors of predictions that were just stored; each is a slice of one long array.
INSERT INTO embeddings (prediction_id, model, version, dimension, embedding)
SELECT prediction_id, model, version, stop - start, ($6::real[])[start + 1:stop]::vector
FROM unnest($1::text[], $2::text[], $3::text[], $4::integer[], $5::integer[])
    AS new (prediction_id, model, version, start, stop)

-- name: prediction_identities
-- Tell a repeat (same picture) from a conflict.
SELECT prediction_id, image_id, input_sha256 FROM predictions WHERE prediction_id = ANY($1::text[])

-- name: raise_revisions
-- Models that were activated again say what they have said: it becomes the newest again, and stays what it is.
UPDATE predictions SET revision = locked.revision
FROM (SELECT old.prediction_id, new.revision
      FROM predictions AS old
      JOIN unnest($1::text[], $2::bigint[]) AS new (prediction_id, revision) USING (prediction_id)
      WHERE old.revision < new.revision
      ORDER BY old.prediction_id FOR UPDATE OF old) AS locked
WHERE predictions.prediction_id = locked.prediction_id

-- name: predictions_of_image
-- All predictions of one image, of every version of the models, oldest first.
SELECT prediction_id, position, image_id, deployment, lane, outcome, models, receipt, reason, traceparent,
       predicted_at, stored_at, revision, published_at
FROM predictions WHERE image_id = $1 ORDER BY position

-- name: newest_predictions_of_image
-- The newest prediction of one image in each deployment, oldest first.
SELECT prediction_id, position, image_id, deployment, lane, outcome, models, receipt, reason, traceparent,
       predicted_at, stored_at, revision, published_at
FROM newest_predictions WHERE image_id = $1 ORDER BY position

-- name: recent_predictions
-- A page of predictions, newest first.
SELECT prediction_id, position, image_id, deployment, lane, outcome, models, receipt, reason, traceparent,
       predicted_at, stored_at, revision, published_at
FROM predictions
WHERE ($2::bigint IS NULL OR position < $2) AND ($3::text IS NULL OR deployment = $3)
ORDER BY position DESC LIMIT $1

-- name: embeddings_of_prediction
-- The vectors of one prediction, by model.
SELECT model, embedding::real[] AS embedding FROM embeddings WHERE prediction_id = $1 ORDER BY model

-- name: accounting_of_results
-- Every result of the images whose ids start with $1, or are in $2, and whether it is the one that is shown.
SELECT image_id, deployment, outcome, prediction_id,
       prediction_id IN (SELECT prediction_id FROM newest_predictions
                         WHERE starts_with(image_id, $1) AND ($2::text[] IS NULL OR image_id = ANY($2))) AS is_newest
FROM predictions
WHERE starts_with(image_id, $1) AND ($2::text[] IS NULL OR image_id = ANY($2))

-- name: accounting_of_dead_letters
-- Every dead letter of the images whose ids start with $1, or are in $2.
SELECT image_id, consumer_group, topic, partition, "offset", code, redriven_at IS NOT NULL AS redriven
FROM dead_letters
WHERE starts_with(coalesce(image_id, ''), $1) AND ($2::text[] IS NULL OR image_id = ANY($2))
