-- name: gpu_list
-- GPUs by host and UUID, after ($5, $6); with their open alerts by severity.
SELECT gpus.gpu_id, gpu_uuid, host, peer_key, index, model, device, pci_bus_id, parent_uuid, driver_version, labels, state,
       first_seen, last_seen, conflicts, conflict_host, alerts.critical, alerts.warning, alerts.info
FROM gpus
LEFT JOIN LATERAL (
    SELECT count(*) FILTER (WHERE severity = 'critical') AS critical,
           count(*) FILTER (WHERE severity = 'warning') AS warning,
           count(*) FILTER (WHERE severity = 'info') AS info
    FROM gpu_alerts WHERE gpu_alerts.gpu_id = gpus.gpu_id AND gpu_alerts.state <> 'resolved' AND gpu_alerts.state = 'firing'
) AS alerts ON true
WHERE ($1::text IS NULL OR host = $1) AND ($2::text IS NULL OR model = $2) AND ($3::text IS NULL OR state = $3)
  AND ($4::text IS NULL OR peer_key = $4)
  AND ($5::text IS NULL OR (host, gpu_uuid) > ($5, $6::text))
  AND ($7::text IS NULL OR gpu_uuid = $7)
ORDER BY host, gpu_uuid LIMIT $8

-- name: host_list
-- Hosts after $1, with their GPUs and what fires on them.
SELECT host, count(*) AS gpus, count(*) FILTER (WHERE gpus.state = 'lost') AS lost,
       array_agg(DISTINCT model) FILTER (WHERE model IS NOT NULL) AS models,
       array_agg(DISTINCT peer_key) AS peer_keys, max(last_seen) AS last_seen,
       coalesce(sum(alerts.critical), 0)::bigint AS critical, coalesce(sum(alerts.warning), 0)::bigint AS warning,
       coalesce(sum(alerts.info), 0)::bigint AS info
FROM gpus
LEFT JOIN LATERAL (
    SELECT count(*) FILTER (WHERE severity = 'critical') AS critical,
           count(*) FILTER (WHERE severity = 'warning') AS warning,
           count(*) FILTER (WHERE severity = 'info') AS info
    FROM gpu_alerts WHERE gpu_alerts.gpu_id = gpus.gpu_id AND gpu_alerts.state <> 'resolved' AND gpu_alerts.state = 'firing'
) AS alerts ON true
WHERE $1::text IS NULL OR host > $1
GROUP BY host ORDER BY host LIMIT $2

-- name: gpu_id
-- The number of a GPU.
SELECT gpu_id FROM gpus WHERE gpu_uuid = $1

-- name: has_other_field
-- Whether a GPU has values of a field that is not in the table of fields, in a time.
SELECT EXISTS (SELECT FROM gpu_samples WHERE gpu_id = $1 AND time >= $2 AND time <= $3 AND other ? $4)

-- name: alert_list
-- Alerts, the latest begun first, after ($7, $8); without those that ended before they had held for long enough.
SELECT alert_id, gpu_uuid, host, model, rule, severity, state, since, seen_at, fired_at, resolved_at, condition
FROM gpu_alerts
WHERE ($1::text[] IS NULL OR state = ANY($1)) AND ($2::text[] IS NULL OR severity = ANY($2))
  AND ($3::text IS NULL OR rule = $3) AND ($4::text IS NULL OR host = $4) AND ($5::text IS NULL OR gpu_uuid = $5)
  AND ($6::timestamptz IS NULL OR since >= $6) AND NOT (state = 'resolved' AND fired_at IS NULL)
  AND ($7::timestamptz IS NULL OR since < $7 OR (since = $7 AND alert_id > $8::text))
ORDER BY since DESC, alert_id LIMIT $9

-- name: alert
-- One alert.
SELECT alert_id, gpu_uuid, host, model, rule, severity, state, since, seen_at, fired_at, resolved_at, condition
FROM gpu_alerts WHERE alert_id = $1

-- name: alerts_that_begin
-- Ids of alerts that begin with $1, at most two.
SELECT alert_id FROM gpu_alerts WHERE alert_id ^@ $1 ORDER BY alert_id LIMIT 2

-- name: energy_of_gpus
-- Energy and idle time of each GPU from minute $1 to minute $4, of whole hours from $2 to $3 by the hour.
WITH parts AS (
    SELECT gpu_id, joules, seconds, idle_seconds FROM gpu_minutes
    WHERE time >= $1 AND time < least($2::timestamptz, $4::timestamptz)
    UNION ALL
    SELECT gpu_id, joules, seconds, idle_seconds FROM gpu_hours WHERE time >= $2 AND time < $3
    UNION ALL
    SELECT gpu_id, joules, seconds, idle_seconds FROM gpu_minutes
    WHERE time >= greatest($2::timestamptz, $3::timestamptz) AND time < $4
), summed AS (
    SELECT gpu_id, sum(joules) AS joules, sum(seconds) AS seconds, sum(idle_seconds) AS idle_seconds
    FROM parts GROUP BY gpu_id
)
SELECT gpu_uuid, host, model, joules, seconds, idle_seconds
FROM summed JOIN gpus USING (gpu_id)
WHERE $5::text IS NULL OR host = $5

-- name: energy_of_predictions
-- Energy of the predictions stored from $1 to $2 that say how much they took.
SELECT count(*) AS predictions, sum((receipt->>'joules')::float8) AS joules
FROM predictions
WHERE stored_at >= $1 AND stored_at < $2 AND receipt ? 'joules'
