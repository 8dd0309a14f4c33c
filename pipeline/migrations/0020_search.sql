-- Search by image: vectors are comparable only within one version of a model, which they now name.
-- `pipeline/vector_indexes.py` builds an HNSW index per (model, version, dimension) when there are many of them.

ALTER TABLE embeddings ADD COLUMN version text CHECK (length(version) <= 512);

UPDATE embeddings SET version = result->>'version'
FROM predictions, jsonb_array_elements(predictions.models) AS result
WHERE predictions.prediction_id = embeddings.prediction_id AND result->>'model' = embeddings.model;

-- A row whose prediction does not name its model cannot be searched, and cannot be by contract.
DELETE FROM embeddings WHERE version IS NULL;

ALTER TABLE embeddings ALTER COLUMN version SET NOT NULL;

-- Which kinds of vectors there are, and all of one kind for an exact search.
CREATE INDEX embeddings_by_kind ON embeddings (model, version, dimension);

-- What may be found: of each image and deployment the newest prediction, with what searches filter by.
CREATE VIEW searchable AS
SELECT embeddings.prediction_id, embeddings.model, embeddings.version, embeddings.dimension,
       embeddings.embedding, predictions.image_id, predictions.deployment, predictions.models,
       images.source, coalesce(images.published_at, predictions.predicted_at) AS published_at
FROM embeddings
JOIN predictions ON predictions.prediction_id = embeddings.prediction_id
LEFT JOIN images ON images.image_id = predictions.image_id
WHERE predictions.outcome = 'predicted'
  AND NOT EXISTS (SELECT FROM predictions AS newer
                  WHERE newer.image_id = predictions.image_id AND newer.deployment = predictions.deployment
                    AND newer.outcome = 'predicted' AND newer.position > predictions.position);
