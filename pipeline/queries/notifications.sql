-- name: lock_receivers
-- One transaction at a time decides what a receiver is told; receivers in one order, so that nobody deadlocks.
SELECT pg_advisory_xact_lock($1, hashtext(name)) FROM (SELECT unnest($2::text[]) AS name ORDER BY 1) AS ordered

-- name: save_notifications
-- Note who is to be told; what is known already stays. The end of an alert waits until its beginning was told.
INSERT INTO gpu_notifications (receiver, alert_id, state, alert, group_key, status, due_at, since)
SELECT receiver, alert_id, state, alert, group_key, 'waiting',
       CASE WHEN state = 'firing' THEN now() + make_interval(secs => wait_seconds) END, since
FROM unnest($1::text[], $2::text[], $3::text[], $4::jsonb[], $5::text[], $6::float8[], $7::timestamptz[])
    AS new (receiver, alert_id, state, alert, group_key, wait_seconds, since)
ON CONFLICT DO NOTHING
RETURNING receiver, alert_id, state

-- name: revive_ends
-- Ends that came before their beginnings $2, and so were skipped, are to be told after all.
UPDATE gpu_notifications SET status = 'waiting', reason = NULL, settled_at = NULL
WHERE receiver = $1 AND alert_id = ANY($2::text[]) AND state = 'resolved' AND status = 'skipped'

-- name: release_ends
-- Ends of alerts $2 whose beginnings are settled: to be told after $3 seconds if those were, else skipped.
WITH ends AS (
    SELECT ended.alert_id, coalesce(begun.status, 'absent') AS begun
    FROM gpu_notifications AS ended
    LEFT JOIN gpu_notifications AS begun
        ON (begun.receiver, begun.alert_id, begun.state) = (ended.receiver, ended.alert_id, 'firing')
    WHERE ended.receiver = $1 AND ended.alert_id = ANY($2::text[]) AND ended.state = 'resolved'
      AND ended.status = 'waiting' AND ended.due_at IS NULL
), over AS (
    -- Neither said again nor told when its silence ends.
    UPDATE gpu_notifications AS begun SET due_at = NULL
    FROM ends
    WHERE begun.receiver = $1 AND begun.alert_id = ends.alert_id AND begun.state = 'firing'
      AND begun.status IN ('delivered', 'silenced')
)
UPDATE gpu_notifications AS ended
SET status = CASE begun WHEN 'delivered' THEN 'waiting' ELSE 'skipped' END,
    due_at = CASE begun WHEN 'delivered' THEN now() + make_interval(secs => $3) END,
    settled_at = CASE begun WHEN 'delivered' THEN NULL ELSE now() END,
    reason = CASE begun WHEN 'delivered' THEN NULL WHEN 'absent' THEN 'it never fired'
                        ELSE 'nobody was told that it fires: that is ' || begun END
FROM ends
WHERE ended.receiver = $1 AND ended.alert_id = ends.alert_id AND ended.state = 'resolved'
  AND begun NOT IN ('waiting', 'sending')

-- name: next_due
-- What receiver $1 is due first, and in how many seconds.
SELECT status, group_key, message_id, extract(epoch FROM due_at - now())::float8 AS seconds
FROM gpu_notifications WHERE receiver = $1 AND due_at IS NOT NULL ORDER BY due_at, alert_id LIMIT 1

-- name: group_due
-- Up to $3 transitions that may share a message, oldest first; those of a group that is due need not wait longer.
SELECT alert_id, state, alert, status,
       since < now() - make_interval(secs => $4) AND status = 'waiting' AS is_too_old
FROM gpu_notifications
WHERE receiver = $1 AND group_key = $2 AND due_at IS NOT NULL
  AND (status = 'waiting' OR status IN ('silenced', 'delivered') AND due_at <= now())
ORDER BY since, alert_id, state LIMIT $3

-- name: begin_message
-- Have these transitions be one message, whose first attempt begins now and has $5 seconds.
UPDATE gpu_notifications SET message_id = $2, attempts = 1, due_at = now() + make_interval(secs => $5),
    since = CASE WHEN status = 'waiting' THEN since ELSE now() END, status = 'sending', settled_at = NULL,
    silence_id = NULL, reason = NULL
FROM unnest($3::text[], $4::text[]) AS member (alert, step)
WHERE receiver = $1 AND alert_id = member.alert AND state = member.step

-- name: repeat_message
-- Begin another attempt at a message, which has $3 seconds; no row if it was settled meanwhile.
UPDATE gpu_notifications SET attempts = attempts + 1, due_at = now() + make_interval(secs => $3)
WHERE receiver = $1 AND message_id = $2 AND status = 'sending' AND due_at <= now()
RETURNING alert_id, state, alert, attempts, extract(epoch FROM now() - since)::float8 AS age_seconds

-- name: retry_message
-- Try a message again in $3 seconds, as $4 says why.
UPDATE gpu_notifications SET due_at = now() + make_interval(secs => $3), reason = $4
WHERE receiver = $1 AND message_id = $2 AND status = 'sending'

-- name: settle_message
-- End a message as $3; what fires is said again after $5 seconds, if any.
UPDATE gpu_notifications
SET status = $3, settled_at = now(), reason = $4,
    due_at = CASE WHEN state = 'firing' THEN now() + make_interval(secs => $5) END
WHERE receiver = $1 AND message_id = $2 AND status = 'sending'
RETURNING alert_id, state

-- name: settle_unsent
-- End a transition that is not sent; a silenced one is looked at again at $6.
UPDATE gpu_notifications SET status = $4, settled_at = now(), reason = $5, due_at = $6, silence_id = $7
WHERE receiver = $1 AND alert_id = $2 AND state = $3

-- name: silences_in_force
-- The silences that hold now.
SELECT silence_id, match, starts_at, ends_at, comment, created_by, created_at
FROM gpu_silences WHERE starts_at <= now() AND ends_at > now()

-- name: silences
-- Silences, newest first: those that hold or will, or all of them.
SELECT silence_id, match, starts_at, ends_at, comment, created_by, created_at
FROM gpu_silences
WHERE ($1 OR ends_at > now()) AND ($3::bigint IS NULL OR silence_id < $3)
ORDER BY silence_id DESC LIMIT $2

-- name: save_silence
-- Begin a silence.
INSERT INTO gpu_silences (match, starts_at, ends_at, comment, created_by)
VALUES ($1::jsonb, $2, $3, $4, $5)
RETURNING silence_id, match, starts_at, ends_at, comment, created_by, created_at

-- name: end_silence
-- End a silence now, or before it began; what it held back is looked at again. No row: there is none that goes on.
WITH ended AS (
    UPDATE gpu_silences SET ends_at = now(), starts_at = least(starts_at, now())
    WHERE silence_id = $1 AND ends_at > now()
    RETURNING silence_id, match, starts_at, ends_at, comment, created_by, created_at
), freed AS (
    UPDATE gpu_notifications SET due_at = now()
    FROM ended
    WHERE gpu_notifications.silence_id = ended.silence_id AND status = 'silenced' AND due_at IS NOT NULL
)
SELECT * FROM ended

-- name: notifications_of_alerts
-- Who was told of these alerts, or is to be.
SELECT receiver, alert_id, state, status, attempts, since, settled_at, silence_id, reason
FROM gpu_notifications WHERE alert_id = ANY($1::text[]) ORDER BY alert_id, state, receiver

-- name: expire_notifications
-- Delete up to $2 transitions, of alerts that are over, settled before $1; and up to $2 silences that ended before.
WITH old AS (
    SELECT receiver, alert_id, state FROM gpu_notifications
    WHERE settled_at < $1 AND due_at IS NULL
      AND NOT EXISTS (SELECT FROM gpu_alerts WHERE gpu_alerts.alert_id = gpu_notifications.alert_id
                      AND gpu_alerts.state <> 'resolved')
    LIMIT $2 FOR UPDATE SKIP LOCKED
), told AS (
    DELETE FROM gpu_notifications USING old
    WHERE (gpu_notifications.receiver, gpu_notifications.alert_id, gpu_notifications.state)
        = (old.receiver, old.alert_id, old.state)
    RETURNING 1
), silent AS (
    DELETE FROM gpu_silences WHERE silence_id IN (
        SELECT silence_id FROM gpu_silences WHERE ends_at < $1 LIMIT $2 FOR UPDATE SKIP LOCKED)
    RETURNING 1
)
SELECT (SELECT count(*) FROM told) + (SELECT count(*) FROM silent) AS rows

-- name: count_notifications
-- How many transitions a receiver was told of, or is to be, by status.
SELECT status, count(*) AS count FROM gpu_notifications WHERE receiver = $1 GROUP BY status
