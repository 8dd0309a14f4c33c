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
