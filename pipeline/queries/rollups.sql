-- name: minutes_due
-- Minutes that began before $1 and whose roll-up is not right, oldest first.
SELECT DISTINCT time FROM gpu_rollups_due WHERE step = 'minute' AND time <= $1 ORDER BY time

-- name: hours_due
-- Hours that are over ($1), or whose roll-up has not been right for long ($2), oldest first.
SELECT time FROM gpu_rollups_due WHERE step = 'hour'
GROUP BY time HAVING time <= $1 OR min(marked_at) <= $2 ORDER BY time

-- name: take_due
-- The GPUs whose roll-up of a minute or an hour is not right; it will be, if this transaction commits.
DELETE FROM gpu_rollups_due WHERE step = $1 AND time = $2 RETURNING gpu_ids

-- name: samples_of_minute
-- The samples of GPUs $1 in the minute $2; time, idle time and energy since the sample before each; XID errors.
WITH due AS (
    SELECT unnest($1::integer[]) AS gpu_id
), inside AS MATERIALIZED (
    SELECT gpu_samples.* FROM due JOIN gpu_samples USING (gpu_id)
    WHERE time >= $2 AND time < $2::timestamptz + interval '1 minute'
), measured AS (
    SELECT before.* FROM due CROSS JOIN LATERAL (
        SELECT gpu_id, time, energy_millijoules, power_watts, utilization_percent FROM gpu_samples
        WHERE gpu_samples.gpu_id = due.gpu_id AND time < $2 AND time >= $2::timestamptz - interval '1 day'
          AND coalesce(energy_millijoules, power_watts, utilization_percent) IS NOT NULL
        ORDER BY time DESC LIMIT 1) AS before
    UNION ALL
    SELECT gpu_id, time, energy_millijoules, power_watts, utilization_percent FROM inside
    WHERE coalesce(energy_millijoules, power_watts, utilization_percent) IS NOT NULL
), pairs AS (
    SELECT gpu_id, time, utilization_percent, (power_watts + lag(power_watts) OVER earlier) / 2 AS watts,
           extract(epoch FROM time - lag(time) OVER earlier)::double precision AS gap,
           -- After a reset the counter began at zero.
           CASE WHEN energy_millijoules >= lag(energy_millijoules) OVER earlier
                THEN energy_millijoules - lag(energy_millijoules) OVER earlier
                WHEN lag(energy_millijoules) OVER earlier IS NOT NULL THEN energy_millijoules END / 1000 AS gained
    FROM measured WINDOW earlier AS (PARTITION BY gpu_id ORDER BY time)
), spans AS (
    SELECT gpu_id, sum(gap) FILTER (WHERE gap <= 300) AS seconds,
           sum(gap) FILTER (WHERE gap <= 300 AND utilization_percent < 5) AS idle_seconds,
           -- No GPU draws 20 kW: a counter that says so has jumped.
           sum(CASE WHEN gained <= gap * 20000 THEN gained WHEN gap <= 300 THEN watts * gap END) AS joules
    FROM pairs WHERE time >= $2 GROUP BY gpu_id
), errors AS (
    SELECT gpu_id, array_agg(xid ORDER BY time) AS xids FROM inside, unnest(xids) AS xid GROUP BY gpu_id
)

-- name: minutes_after
-- Of each GPU the minute of the first sample after minute $2, where it is computed already.
SELECT after.minute, array_agg(after.gpu_id) AS gpu_ids
FROM unnest($1::integer[]) AS due (gpu_id) CROSS JOIN LATERAL (
    SELECT gpu_id, date_trunc('minute', time, 'UTC') AS minute FROM gpu_samples
    WHERE gpu_samples.gpu_id = due.gpu_id AND time >= $2::timestamptz + interval '1 minute'
      AND time < $2::timestamptz + interval '1 day'
      AND coalesce(energy_millijoules, power_watts, utilization_percent) IS NOT NULL
    ORDER BY time LIMIT 1) AS after
JOIN gpu_minutes ON gpu_minutes.gpu_id = after.gpu_id AND gpu_minutes.time = after.minute
GROUP BY after.minute

-- name: minutes_of_hour
-- The minutes of GPUs $1 in the hour $2, and their XID errors.
WITH inside AS MATERIALIZED (
    SELECT gpu_minutes.* FROM gpu_minutes
    WHERE gpu_id = ANY($1::integer[]) AND time >= $2 AND time < $2::timestamptz + interval '1 hour'
), errors AS (
    SELECT gpu_id, array_agg(xid ORDER BY time) AS xids FROM inside, unnest(xids) AS xid GROUP BY gpu_id
)
