-- When a prediction was published: the broker's time of appending its record; null where its topic keeps no such time.
ALTER TABLE predictions ADD COLUMN published_at timestamptz;

CREATE OR REPLACE VIEW newest_predictions AS
SELECT DISTINCT ON (image_id, deployment) *
FROM predictions
ORDER BY image_id, deployment, outcome = 'predicted' DESC, revision DESC, position DESC;
