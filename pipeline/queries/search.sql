-- name: vectors_of_image
-- The vectors of image $1's newest prediction in deployment $2, in the order of its models.
SELECT prediction_id, image_id, deployment, model, version, dimension, embedding::real[] AS numbers
FROM searchable
WHERE image_id = $1 AND deployment = $2
ORDER BY (SELECT place FROM jsonb_array_elements(models) WITH ORDINALITY AS listed (result, place)
          WHERE result->>'model' = model LIMIT 1)

-- name: vector_of_prediction
-- The vector of one model in prediction $1, newest or not.
SELECT prediction_id, image_id, deployment, model, version, dimension, embedding::real[] AS numbers
FROM embeddings JOIN predictions USING (prediction_id)
WHERE prediction_id = $1 AND model = $2

-- name: nearest_exact
-- The $12 nearest to vector $1 after ($10, $11), by the distance to every one that the filters leave.
WITH measured AS MATERIALIZED (
    SELECT prediction_id, image_id, embedding <=> $1::real[]::vector AS distance
    FROM searchable
    WHERE model = $2 AND version = $3 AND dimension = $4 AND deployment = $5
      AND ($6::text IS NULL OR models @> jsonb_build_array(jsonb_build_object('label', $6::text))
           OR models @> jsonb_build_array(jsonb_build_object('boxes', jsonb_build_array(
                  jsonb_build_object('label', $6::text)))))
      AND ($7::text IS NULL OR source = $7)
      AND ($8::timestamptz IS NULL OR published_at >= $8)
      AND ($9::timestamptz IS NULL OR published_at < $9)
), nearest AS (
    SELECT * FROM measured
    -- The cosine of a vector of zeros is not a number.
    WHERE distance <> 'NaN' AND ($11::text IS NULL OR (distance, image_id) > ($10::float8, $11))
    ORDER BY distance, image_id LIMIT $12
)
SELECT nearest.prediction_id, nearest.image_id, distance, models, source, published_at
FROM nearest JOIN searchable USING (prediction_id)
WHERE model = $2
ORDER BY distance, nearest.image_id

-- name: nearest_approximate
-- The same through an HNSW index; `vector(0)` stands for the type that the index is on.
SELECT prediction_id, image_id, embedding::vector(0) <=> $1::real[]::vector(0) AS distance,
       models, source, published_at
FROM searchable
WHERE model = $2 AND version = $3 AND dimension = $4 AND deployment = $5
  AND ($6::text IS NULL OR models @> jsonb_build_array(jsonb_build_object('label', $6::text))
       OR models @> jsonb_build_array(jsonb_build_object('boxes', jsonb_build_array(
              jsonb_build_object('label', $6::text)))))
  AND ($7::text IS NULL OR source = $7)
  AND ($8::timestamptz IS NULL OR published_at >= $8)
  AND ($9::timestamptz IS NULL OR published_at < $9)
  AND ($11::text IS NULL
       OR (embedding::vector(0) <=> $1::real[]::vector(0), image_id) > ($10::float8, $11))
ORDER BY embedding::vector(0) <=> $1::real[]::vector(0), image_id
LIMIT $12

-- name: prefer_index
-- For this transaction: walk the HNSW index for as long as the filters need, and never sort everything instead.
SELECT set_config(name, value, true)
FROM unnest($1::text[], $2::text[]) AS given (name, value)

-- name: index_is_valid
-- Whether an index of this name can be used.
SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)

-- name: spaces
-- Every kind of vector there is; steps from one to the next in the index, however many vectors there are.
WITH RECURSIVE found AS (
    (SELECT model, version, dimension FROM embeddings ORDER BY model, version, dimension LIMIT 1)
    UNION ALL
    SELECT next.model, next.version, next.dimension
    FROM found, LATERAL (
        SELECT model, version, dimension FROM embeddings
        WHERE (embeddings.model, embeddings.version, embeddings.dimension)
            > (found.model, found.version, found.dimension)
        ORDER BY model, version, dimension LIMIT 1) AS next
)
SELECT model, version, dimension FROM found

-- name: vector_count
-- How many vectors of one kind there are, counted no further than $4.
SELECT count(*) FROM (SELECT FROM embeddings WHERE model = $1 AND version = $2 AND dimension = $3 LIMIT $4) AS counted

-- name: vector_indexes
-- The HNSW indexes that Millrace made, or began to.
SELECT relname AS name, indisvalid AS is_valid
FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
WHERE indrelid = to_regclass('embeddings') AND starts_with(relname, 'embeddings_hnsw_')

-- name: index_statements
-- The statements that make index $1 on type $2 for (model, version, dimension) $3 to $5, literals quoted.
SELECT format('CREATE INDEX CONCURRENTLY IF NOT EXISTS %I ON embeddings USING hnsw ((embedding::%s) %s) '
              'WHERE model = %L AND version = %L AND dimension = %s', $1::text, $2::text,
              split_part($2, '(', 1) || '_cosine_ops', $3::text, $4::text, $5::integer) AS make,
       format('COMMENT ON INDEX %I IS %L', $1, $3 || ' ' || $4 || ', ' || $5 || ' dimensions') AS label
