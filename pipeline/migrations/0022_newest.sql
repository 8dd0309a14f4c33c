-- The newest prediction of an image in a deployment in one step: search asks it of every candidate, and without
-- statistics of a table that was just filled PostgreSQL would read half of another index for each.

DROP INDEX predictions_by_image;
CREATE INDEX predictions_by_image ON predictions (image_id, deployment, position);
