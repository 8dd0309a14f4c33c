-- What may be found is what is shown: of an image and deployment the prediction of the newest revision of the models
-- (`newest_predictions`), whichever was stored last.

DROP INDEX predictions_by_image;
CREATE INDEX predictions_by_image ON predictions (image_id, deployment, revision, position);

CREATE OR REPLACE VIEW searchable AS
SELECT embeddings.prediction_id, embeddings.model, embeddings.version, embeddings.dimension,
       embeddings.embedding, predictions.image_id, predictions.deployment, predictions.models,
       images.source, coalesce(images.published_at, predictions.predicted_at) AS published_at
FROM embeddings
JOIN predictions ON predictions.prediction_id = embeddings.prediction_id
LEFT JOIN images ON images.image_id = predictions.image_id
WHERE predictions.outcome = 'predicted'
  AND NOT EXISTS (SELECT FROM predictions AS newer
                  WHERE newer.image_id = predictions.image_id AND newer.deployment = predictions.deployment
                    AND newer.outcome = 'predicted'
                    AND (newer.revision, newer.position) > (predictions.revision, predictions.position));
