-- name: save_model_versions
-- Insert versions; one that is there stays as it is.
INSERT INTO model_versions (deployment, revision, activated_at, activated_by, models, artefacts, predecessor, note)
SELECT * FROM unnest($1::text[], $2::bigint[], $3::timestamptz[], $4::text[], $5::jsonb[], $6::jsonb[], $7::bigint[],
                     $8::text[])
    AS new (deployment, revision, activated_at, activated_by, models, artefacts, predecessor, note)
-- One order for all writers: they wait for each other and never deadlock.
ORDER BY deployment, revision, activated_at
ON CONFLICT DO NOTHING

-- name: save_model_reports
-- Insert what replicas say; most of it repeats what is there.
INSERT INTO model_reports (deployment, revision, replica, state, since, models, reason)
SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::timestamptz[], $6::jsonb[], $7::text[])
    AS new (deployment, revision, replica, state, since, models, reason)
ORDER BY deployment, revision, replica, state, since
ON CONFLICT DO NOTHING

-- name: model_history
-- The versions of a deployment, newest first, with what came of each on the replicas that said so.
SELECT version.deployment, version.revision, version.models, version.artefacts, version.predecessor, version.note,
       version.activated_by, version.activated_at,
       coalesce((SELECT jsonb_agg(jsonb_build_object('replica', report.replica, 'state', report.state,
                                                     'since', report.since, 'models', report.models,
                                                     'reason', report.reason)
                                  ORDER BY report.since, report.replica, report.state)
                 FROM model_reports AS report
                 WHERE report.deployment = version.deployment AND report.revision = version.revision),
                '[]') AS reports
FROM model_versions AS version
WHERE version.deployment = $1 AND ($3::bigint IS NULL OR version.revision < $3)
ORDER BY version.activated_at DESC, version.revision DESC LIMIT $2

-- name: expire_model_versions
-- Count versions that another took the place of before $1, but for what the present one falls back to; delete them if $2.
WITH old AS (
    SELECT version.deployment, version.revision, version.activated_at FROM model_versions AS version
    WHERE EXISTS (SELECT FROM model_versions AS later
                  WHERE later.deployment = version.deployment AND later.activated_at > version.activated_at
                    AND later.stored_at < $1)
      AND version.revision IS DISTINCT FROM
          (SELECT present.predecessor FROM model_versions AS present WHERE present.deployment = version.deployment
           ORDER BY present.activated_at DESC, present.revision DESC LIMIT 1)
), deleted AS (
    DELETE FROM model_versions AS version USING old
    WHERE $2 AND (version.deployment, version.revision, version.activated_at)
               = (old.deployment, old.revision, old.activated_at)
)
SELECT count(*) AS versions FROM old

-- name: expire_model_reports
-- Forget what replicas said before $1 of versions that are not kept.
DELETE FROM model_reports AS report
WHERE report.stored_at < $1
  AND NOT EXISTS (SELECT FROM model_versions AS version
                  WHERE version.deployment = report.deployment AND version.revision = report.revision)

-- name: kept_artefacts
-- The files of every version that is kept.
SELECT DISTINCT artefact->>'name' AS name, artefact->>'sha256' AS sha256,
       (artefact->>'size_bytes')::bigint AS size_bytes
FROM model_versions, jsonb_array_elements(artefacts) AS artefact
