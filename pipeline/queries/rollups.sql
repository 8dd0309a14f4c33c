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
-- The samples of GPUs $1 in the minute $2; time, idle time and energy since the samples before, from $3 on; XID errors.
WITH due AS (
    SELECT unnest($1::integer[]) AS gpu_id
), inside AS MATERIALIZED (
    SELECT gpu_samples.* FROM due JOIN gpu_samples USING (gpu_id)
    WHERE time >= $2 AND time < $2::timestamptz + interval '1 minute'
), present AS MATERIALIZED (
    SELECT gpu_id, count(energy_millijoules) > 0 AS counter, count(power_watts) > 0 AS power,
           count(utilization_percent) > 0 AS utilization, avg(power_watts) AS watts
    FROM inside GROUP BY gpu_id
), newest AS MATERIALIZED (
    SELECT before.* FROM due CROSS JOIN LATERAL (
        SELECT gpu_id, time, energy_millijoules, power_watts, utilization_percent FROM gpu_samples
        WHERE gpu_samples.gpu_id = due.gpu_id AND time < $2 AND time >= $3
          AND coalesce(energy_millijoules, power_watts, utilization_percent) IS NOT NULL
        ORDER BY time DESC LIMIT 1) AS before
), earlier AS (
    -- What the newest one lacks, an earlier one may have; what a GPU never has is not looked for.
    SELECT newest.gpu_id, missing.* FROM newest JOIN present USING (gpu_id) CROSS JOIN LATERAL (
        (SELECT time, energy_millijoules, NULL::float8, NULL::float8 FROM gpu_samples AS before
         WHERE newest.energy_millijoules IS NULL AND (present.counter OR EXISTS (
                   SELECT FROM gpu_minutes WHERE gpu_minutes.gpu_id = newest.gpu_id AND energy_millijoules_count > 0
                   AND gpu_minutes.time > newest.time - interval '6 minutes' AND gpu_minutes.time < $2))
           AND before.gpu_id = newest.gpu_id AND time < newest.time AND time >= newest.time - interval '5 minutes'
           AND time < $2 AND time >= $3 AND energy_millijoules IS NOT NULL
         ORDER BY time DESC LIMIT 1)
        UNION ALL
        (SELECT time, NULL, power_watts, NULL FROM gpu_samples AS before
         WHERE newest.power_watts IS NULL AND present.power
           AND before.gpu_id = newest.gpu_id AND time < newest.time AND time >= newest.time - interval '5 minutes'
           AND time < $2 AND time >= $3 AND power_watts IS NOT NULL
         ORDER BY time DESC LIMIT 1)
        UNION ALL
        (SELECT time, NULL, NULL, utilization_percent FROM gpu_samples AS before
         WHERE newest.utilization_percent IS NULL AND present.utilization
           AND before.gpu_id = newest.gpu_id AND time < newest.time AND time >= newest.time - interval '5 minutes'
           AND time < $2 AND time >= $3 AND utilization_percent IS NOT NULL
         ORDER BY time DESC LIMIT 1)) AS missing
), measured AS (
    SELECT gpu_id, date_part('epoch', time - $2) AS at, energy_millijoules, power_watts, utilization_percent
    FROM (SELECT gpu_id, time, energy_millijoules, power_watts, utilization_percent FROM inside
          WHERE coalesce(energy_millijoules, power_watts, utilization_percent) IS NOT NULL
          UNION ALL SELECT * FROM newest UNION ALL SELECT * FROM earlier) AS every
), pairs AS (
    -- Each of the three with the sample before that has it, [time, value]: they may be read at different moments.
    SELECT *, at - lag(at) OVER before AS gap,
           at - max(at) FILTER (WHERE utilization_percent IS NOT NULL) OVER before AS used_gap,
           max(ARRAY[at, power_watts]) FILTER (WHERE power_watts IS NOT NULL) OVER before AS power,
           max(ARRAY[at, energy_millijoules]) FILTER (WHERE energy_millijoules IS NOT NULL) OVER before AS counter
    FROM measured
    WINDOW before AS (PARTITION BY gpu_id ORDER BY at ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
), spans AS MATERIALIZED (
    SELECT gpu_id, sum(gap) FILTER (WHERE gap <= 300) AS seconds,
           sum(used_gap) FILTER (WHERE used_gap <= 300 AND utilization_percent < 5) AS idle_seconds,
           -- No GPU draws 20 kW: a counter that says so has jumped. Beside a counter power would count twice.
           sum(CASE WHEN gained <= counted_gap * 20000 THEN gained
                    WHEN gained IS NOT NULL THEN CASE WHEN counted_gap <= 300 THEN present.watts * counted_gap END
                    WHEN pairs.counter IS NULL AND at - pairs.power[1] <= 300
                    THEN (power_watts + pairs.power[2]) / 2 * (at - pairs.power[1]) END) AS joules
    FROM pairs JOIN present USING (gpu_id) CROSS JOIN LATERAL (
        -- After a reset the counter began at zero.
        SELECT (energy_millijoules - CASE WHEN energy_millijoules >= pairs.counter[2] THEN pairs.counter[2]
                                          WHEN pairs.counter[2] IS NOT NULL THEN 0 END) / 1000 AS gained,
               at - pairs.counter[1] AS counted_gap) AS energy
    WHERE at >= 0 GROUP BY gpu_id
), errors AS MATERIALIZED (
    SELECT gpu_id, array_agg(xid ORDER BY time) AS xids FROM inside, unnest(xids) AS xid GROUP BY gpu_id
)

-- name: minutes_after
-- The minutes after $2 that count from a sample in it, as far as they are computed already: of each GPU the next one,
-- the next with each field that this one has, and until the counter's next all in which power stands back for it.
SELECT time AS minute, array_agg(gpu_id) AS gpu_ids
FROM (
    SELECT after.gpu_id, after.time, row_number() OVER earlier AS number,
           this.energy_millijoules_count > 0 AND count(after.energy_millijoules_count) OVER earlier = 0 AS counter,
           this.power_watts_count > 0 AND after.power_watts_count > 0
               AND count(after.power_watts_count) OVER earlier = 0 AS power,
           this.utilization_percent_count > 0 AND after.utilization_percent_count > 0
               AND count(after.utilization_percent_count) OVER earlier = 0 AS utilization
    FROM gpu_minutes AS this CROSS JOIN LATERAL (
        SELECT gpu_id, time, energy_millijoules_count, power_watts_count, utilization_percent_count FROM gpu_minutes
        WHERE gpu_minutes.gpu_id = this.gpu_id AND time > $2 AND time < $3
          AND coalesce(energy_millijoules_count, power_watts_count, utilization_percent_count) > 0
        -- Samples are looked for five minutes before the newest one.
        ORDER BY time LIMIT 7) AS after
    WHERE this.gpu_id = ANY($1::integer[]) AND this.time = $2
    WINDOW earlier AS (PARTITION BY after.gpu_id ORDER BY after.time ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
) AS following
WHERE number = 1 OR counter OR power OR utilization
GROUP BY time ORDER BY time

-- name: minutes_of_hour
-- The minutes of GPUs $1 in the hour $2, and their XID errors.
WITH inside AS MATERIALIZED (
    SELECT gpu_minutes.* FROM gpu_minutes
    WHERE gpu_id = ANY($1::integer[]) AND time >= $2 AND time < $2::timestamptz + interval '1 hour'
), errors AS (
    SELECT gpu_id, array_agg(xid ORDER BY time) AS xids FROM inside, unnest(xids) AS xid GROUP BY gpu_id
)
