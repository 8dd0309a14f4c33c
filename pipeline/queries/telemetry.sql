-- name: add_gpus
-- Insert GPUs that nobody knew; one that is there takes no value of the sequence: it would run out in months.
INSERT INTO gpus (gpu_uuid, host, peer_key, first_seen, last_seen, state, index, model, device, pci_bus_id,
                  parent_uuid, driver_version, labels)
SELECT gpu_uuid, host, peer_key, last_seen, last_seen, state, index, model, device, pci_bus_id, parent_uuid,
       driver_version, coalesce(labels, '{}')
FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::text[], $6::integer[], $7::text[], $8::text[],
            $9::text[], $10::text[], $11::text[], $12::jsonb[])
    AS new (gpu_uuid, host, peer_key, last_seen, state, index, model, device, pci_bus_id, parent_uuid,
            driver_version, labels)
WHERE NOT EXISTS (SELECT FROM gpus WHERE gpus.gpu_uuid = new.gpu_uuid)
-- One order for all writers: they wait for each other and never deadlock.
ORDER BY gpu_uuid
ON CONFLICT (gpu_uuid) DO NOTHING

-- name: lock_known_gpus
-- Lock GPUs in the same order.
SELECT FROM gpus WHERE gpu_uuid = ANY($1::text[]) ORDER BY gpu_uuid FOR NO KEY UPDATE

-- name: gpu_conflicts
-- Note GPUs that another host names while the first one still does; counts each batch that does.
UPDATE gpus SET conflict_host = new.host, conflict_at = new.last_seen, conflicts = conflicts + 1
FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS new (gpu_uuid, host, last_seen)
WHERE gpus.gpu_uuid = new.gpu_uuid AND gpus.host <> new.host AND new.last_seen < gpus.last_seen + $4::interval
RETURNING gpus.gpu_uuid, gpus.host

-- name: save_gpus
-- Bring GPUs up to date; what is not said stays, and so does a GPU that its own host still names.
UPDATE gpus AS old SET
    host = new.host,
    peer_key = new.peer_key,
    first_seen = least(old.first_seen, new.last_seen),
    last_seen = greatest(old.last_seen, new.last_seen),
    state = CASE WHEN new.last_seen >= old.last_seen THEN new.state ELSE old.state END,
    index = coalesce(new.index, old.index),
    model = coalesce(new.model, old.model),
    device = coalesce(new.device, old.device),
    pci_bus_id = coalesce(new.pci_bus_id, old.pci_bus_id),
    parent_uuid = coalesce(new.parent_uuid, old.parent_uuid),
    driver_version = coalesce(new.driver_version, old.driver_version),
    labels = CASE WHEN new.labels <> '{}' THEN new.labels ELSE old.labels END
FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::text[], $6::integer[], $7::text[], $8::text[],
            $9::text[], $10::text[], $11::text[], $12::jsonb[])
    AS new (gpu_uuid, host, peer_key, last_seen, state, index, model, device, pci_bus_id, parent_uuid,
            driver_version, labels)
WHERE old.gpu_uuid = new.gpu_uuid AND (old.host = new.host OR new.last_seen >= old.last_seen + $13::interval)

-- name: gpu_ids
-- The ids and hosts of GPUs.
SELECT gpu_uuid, gpu_id, host FROM gpus WHERE gpu_uuid = ANY($1::text[])

-- name: mark_rollups
-- Note that the roll-ups of these GPUs change in a minute or an hour.
INSERT INTO gpu_rollups_due (step, time, gpu_ids) VALUES ($1, $2, $3)

-- name: lock_gpus
-- Lock the GPUs whose alerts change, in one order; and say whose they are.
SELECT gpu_id, greatest(reconciled, 'epoch') AS reconciled, host, last_seen
FROM gpu_progress JOIN gpus USING (gpu_id)
WHERE gpu_id = ANY($1::integer[]) ORDER BY gpu_id FOR UPDATE OF gpu_progress

-- name: begin_progress
-- Add GPUs that never had a window.
INSERT INTO gpu_progress (gpu_id) SELECT unnest($1::integer[]) ORDER BY 1 ON CONFLICT DO NOTHING

-- name: save_progress
-- Note up to where alerts follow their windows.
UPDATE gpu_progress SET reconciled = new.reconciled, touched_at = now(), silent_hours = 0
FROM unnest($1::integer[], $2::timestamptz[]) AS new (gpu_id, reconciled)
WHERE gpu_progress.gpu_id = new.gpu_id

-- name: note_silence
-- Count one more hour for GPUs with open alerts that had no window for it; hours in which nobody asks do not count.
WITH silent AS (
    SELECT gpu_id FROM gpu_progress
    WHERE touched_at < now() - interval '1 hour'
      AND EXISTS (SELECT FROM gpu_alerts WHERE gpu_alerts.gpu_id = gpu_progress.gpu_id AND state <> 'resolved')
    ORDER BY gpu_id FOR UPDATE SKIP LOCKED
)
UPDATE gpu_progress SET silent_hours = silent_hours + 1, touched_at = now()
FROM silent WHERE gpu_progress.gpu_id = silent.gpu_id

-- name: lock_silent_gpus
-- Lock up to $2 GPUs with open alerts that had no window for $1 hours.
SELECT gpu_id, greatest(reconciled, 'epoch') AS reconciled FROM gpu_progress
WHERE silent_hours >= $1
  AND EXISTS (SELECT FROM gpu_alerts WHERE gpu_alerts.gpu_id = gpu_progress.gpu_id AND state <> 'resolved')
ORDER BY gpu_id LIMIT $2 FOR UPDATE SKIP LOCKED

-- name: alerts_of_gpus
-- The open alerts of GPUs, and those that are named, open or not.
SELECT alert_id, gpu_id, gpu_uuid, host, model, state, since, seen_at, fired_at, resolved_at, condition
FROM gpu_alerts WHERE gpu_id = ANY($1::integer[]) AND state <> 'resolved'
UNION ALL
SELECT alert_id, gpu_id, gpu_uuid, host, model, state, since, seen_at, fired_at, resolved_at, condition
FROM gpu_alerts WHERE alert_id = ANY($2::text[]) AND state = 'resolved'

-- name: save_gpu_windows
-- Insert windows; one that is there stays.
INSERT INTO gpu_windows (gpu_id, start_time, end_time, samples, aggregates, scores, conditions, xids, rules_version)
SELECT gpu_id, start_time, end_time, samples, aggregates, scores, conditions,
       CASE WHEN xids <> '' THEN string_to_array(xids, ',')::integer[] END, rules_version
FROM unnest($1::integer[], $2::timestamptz[], $3::timestamptz[], $4::integer[], $5::jsonb[], $6::jsonb[], $7::jsonb[],
            $8::text[], $9::text[])
    AS new (gpu_id, start_time, end_time, samples, aggregates, scores, conditions, xids, rules_version)
ORDER BY gpu_id, start_time, end_time
ON CONFLICT DO NOTHING

-- name: save_alerts
-- Insert alerts or bring them up to date; the caller holds the locks of their GPUs.
INSERT INTO gpu_alerts (alert_id, gpu_id, gpu_uuid, host, model, rule, severity, state, since, seen_at, fired_at,
                        resolved_at, condition)
SELECT * FROM unnest($1::text[], $2::integer[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
                     $9::timestamptz[], $10::timestamptz[], $11::timestamptz[], $12::timestamptz[], $13::jsonb[])
ON CONFLICT (alert_id) DO UPDATE SET
    host = excluded.host, severity = excluded.severity, state = excluded.state, seen_at = excluded.seen_at,
    fired_at = excluded.fired_at, resolved_at = excluded.resolved_at, condition = excluded.condition

-- name: save_outbox
-- Queue steps in the life of alerts for their topic, in order.
INSERT INTO gpu_alert_outbox (alert_id, state, value)
SELECT alert_id, state, value
FROM unnest($1::text[], $2::text[], $3::bytea[]) WITH ORDINALITY AS new (alert_id, state, value, number)
ORDER BY number

-- name: outbox_alone
-- Whether this transaction is the only one that publishes.
SELECT pg_try_advisory_xact_lock($1)

-- name: outbox
-- The oldest steps that are not published yet.
SELECT position, alert_id, value FROM gpu_alert_outbox ORDER BY position LIMIT $1

-- name: clear_outbox
-- Take published steps off the queue.
DELETE FROM gpu_alert_outbox WHERE position = ANY($1::bigint[])

-- name: count_expired_alerts
-- Count alerts that were resolved before $1.
SELECT count(*) AS rows FROM gpu_alerts WHERE state = 'resolved' AND resolved_at < $1

-- name: expire_alerts
-- Delete up to $2 alerts that were resolved before $1.
WITH old AS (
    SELECT alert_id FROM gpu_alerts WHERE state = 'resolved' AND resolved_at < $1 LIMIT $2 FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM gpu_alerts USING old WHERE gpu_alerts.alert_id = old.alert_id RETURNING 1
)
SELECT count(*) AS rows FROM deleted
