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
--
-- Counter, power and utilization each count from one row that has it to the next: they may be in the same rows or each
-- in rows of its own, and the first of a minute counts from a row before the minute. `newest` is the row before,
-- `earlier` those with what it lacks; `pairs` sets each row beside those that it counts from, `spans` adds up.
-- `pipeline/rollups.py` makes the roll-up of `inside`, `spans` and `errors`.
WITH due AS (
    SELECT unnest($1::integer[]) AS gpu_id
), inside AS MATERIALIZED (
    SELECT gpu_samples.* FROM due JOIN gpu_samples USING (gpu_id)
    WHERE time >= $2 AND time < $2::timestamptz + interval '1 minute'
), present AS MATERIALIZED (
    -- Which of the three the minute has, and its mean power.
    SELECT gpu_id, count(energy_millijoules) > 0 AS counter, count(power_watts) > 0 AS power,
           count(utilization_percent) > 0 AS utilization, avg(power_watts) AS watts
    FROM inside GROUP BY gpu_id
), newest AS MATERIALIZED (
    -- Of each GPU the last row before the minute with any of the three.
    SELECT before.* FROM due CROSS JOIN LATERAL (
        SELECT gpu_id, time, energy_millijoules, power_watts, utilization_percent FROM gpu_samples
        WHERE gpu_samples.gpu_id = due.gpu_id AND time < $2 AND time >= $3
          AND coalesce(energy_millijoules, power_watts, utilization_percent) IS NOT NULL
        ORDER BY time DESC LIMIT 1) AS before
), lacking AS (
    -- What the newest row lacks and the minute counts from: a field that the minute has, and a counter that was read
    -- lately, as power is not counted beside it. What a GPU never has is left out: all rows of five minutes would be
    -- read to find nothing.
    SELECT newest.gpu_id, newest.time, field FROM newest JOIN present USING (gpu_id) CROSS JOIN LATERAL (VALUES
        ('counter', newest.energy_millijoules IS NULL AND (present.counter OR EXISTS (
            SELECT FROM gpu_minutes WHERE gpu_minutes.gpu_id = newest.gpu_id AND energy_millijoules_count > 0
            AND gpu_minutes.time > newest.time - interval '6 minutes' AND gpu_minutes.time < $2))),
        ('power', newest.power_watts IS NULL AND present.power),
        ('utilization', newest.utilization_percent IS NULL AND present.utilization)) AS one (field, is_lacking)
    WHERE is_lacking
), earlier AS (
    -- For each of these the last row before the newest that has it, whatever else is in it: `pairs` takes the last of
    -- each. That it is before $2 is clear already, but by that the planner leaves other days out.
    SELECT before.* FROM lacking CROSS JOIN LATERAL (
        SELECT gpu_id, time, energy_millijoules, power_watts, utilization_percent FROM gpu_samples
        WHERE gpu_samples.gpu_id = lacking.gpu_id AND time < lacking.time
          AND time >= lacking.time - interval '5 minutes' AND time < $2 AND time >= $3
          AND CASE field WHEN 'counter' THEN energy_millijoules WHEN 'power' THEN power_watts
                         ELSE utilization_percent END IS NOT NULL
        ORDER BY time DESC LIMIT 1) AS before
), measured AS (
    -- The rows that count, by seconds since the minute began: those before it are below zero.
    SELECT gpu_id, date_part('epoch', time - $2) AS at, energy_millijoules, power_watts, utilization_percent
    FROM (SELECT gpu_id, time, energy_millijoules, power_watts, utilization_percent FROM inside
          WHERE coalesce(energy_millijoules, power_watts, utilization_percent) IS NOT NULL
          UNION ALL SELECT * FROM newest UNION ALL SELECT * FROM earlier) AS every
), pairs AS (
    -- Each row beside what was there before: seconds since any of the three and since utilization was read, and
    -- [at, value] of the last power and counter. The last is the largest, as arrays are compared by `at` first.
    SELECT *, at - lag(at) OVER before AS gap,
           at - max(at) FILTER (WHERE utilization_percent IS NOT NULL) OVER before AS utilization_gap,
           max(ARRAY[at, power_watts]) FILTER (WHERE power_watts IS NOT NULL) OVER before AS last_power,
           max(ARRAY[at, energy_millijoules]) FILTER (WHERE energy_millijoules IS NOT NULL) OVER before AS last_counter
    FROM measured
    WINDOW before AS (PARTITION BY gpu_id ORDER BY at ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
), spans AS MATERIALIZED (
    SELECT gpu_id, sum(gap) FILTER (WHERE gap <= 300) AS seconds,
           sum(utilization_gap) FILTER (WHERE utilization_gap <= 300 AND utilization_percent < 5) AS idle_seconds,
           sum(CASE WHEN gained <= counter_gap * 20000 THEN gained
                    -- No GPU draws 20 kW: the counter has jumped, and it is power times time.
                    WHEN gained IS NOT NULL THEN CASE WHEN counter_gap <= 300 THEN present.watts * counter_gap END
                    -- Without a counter; beside one, power would count twice.
                    WHEN last_counter IS NULL AND power_gap <= 300
                    THEN (power_watts + last_power[2]) / 2 * power_gap END) AS joules
    FROM pairs JOIN present USING (gpu_id) CROSS JOIN LATERAL (
        -- In joules; after a reset the counter began at zero.
        SELECT CASE WHEN energy_millijoules < last_counter[2] THEN energy_millijoules
                    ELSE energy_millijoules - last_counter[2] END / 1000 AS gained,
               at - last_counter[1] AS counter_gap, at - last_power[1] AS power_gap) AS step
    WHERE at >= 0 GROUP BY gpu_id
), errors AS MATERIALIZED (
    SELECT gpu_id, array_agg(xid ORDER BY time, place) AS xids
    FROM inside, unnest(xids) WITH ORDINALITY AS one (xid, place) GROUP BY gpu_id
)

-- name: minutes_after
-- The minutes from $2 to $3 that count from a sample of GPUs $1 in the minute $2, as far as they are computed already.
SELECT time AS minute, array_agg(gpu_id) AS gpu_ids
FROM (
    -- Time counts on in the next minute, power and utilization in the next that has it; the counter in its next, and in
    -- those on the way there, as power is not counted beside it.
    SELECT after.gpu_id, after.time, row_number() OVER between_them = 1 AS is_next,
           this.energy_millijoules_count > 0 AND count(after.energy_millijoules_count) OVER between_them = 0 AS counter,
           this.power_watts_count > 0 AND after.power_watts_count > 0
               AND count(after.power_watts_count) OVER between_them = 0 AS power,
           this.utilization_percent_count > 0 AND after.utilization_percent_count > 0
               AND count(after.utilization_percent_count) OVER between_them = 0 AS utilization
    FROM gpu_minutes AS this CROSS JOIN LATERAL (
        SELECT gpu_id, time, energy_millijoules_count, power_watts_count, utilization_percent_count FROM gpu_minutes
        WHERE gpu_minutes.gpu_id = this.gpu_id AND time > $2 AND time < $3
          AND coalesce(energy_millijoules_count, power_watts_count, utilization_percent_count) > 0
        -- As `earlier` looks back five minutes from the newest row, none further on counts from here.
        ORDER BY time LIMIT 7) AS after
    WHERE this.gpu_id = ANY($1::integer[]) AND this.time = $2
    WINDOW between_them AS (
        PARTITION BY after.gpu_id ORDER BY after.time ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
) AS following
WHERE is_next OR counter OR power OR utilization
GROUP BY time ORDER BY time

-- name: minutes_of_hour
-- The minutes of GPUs $1 in the hour $2, and their XID errors.
WITH inside AS MATERIALIZED (
    SELECT gpu_minutes.* FROM gpu_minutes
    WHERE gpu_id = ANY($1::integer[]) AND time >= $2 AND time < $2::timestamptz + interval '1 hour'
), errors AS (
    SELECT gpu_id, array_agg(xid ORDER BY time, place) AS xids
    FROM inside, unnest(xids) WITH ORDINALITY AS one (xid, place) GROUP BY gpu_id
)
