-- Who was told of which alerts, who is still to be told, and what nobody is told of.

-- One row per receiver and step of an alert; it is the queue of what is to be sent, and the proof of what was.
CREATE TABLE gpu_notifications (
    receiver    text COLLATE "C" NOT NULL CHECK (length(receiver) <= 63),
    alert_id    text COLLATE "C" NOT NULL CHECK (length(alert_id) BETWEEN 1 AND 128),
    state       text NOT NULL CHECK (state IN ('firing', 'resolved')),
    -- As `gpu.alerts.v1` said.
    alert       jsonb NOT NULL CHECK (jsonb_typeof(alert) = 'object'),
    -- What agrees in it and comes together is one message.
    group_key   text NOT NULL,
    -- `sending`: an attempt was begun; a message that a killed process left so is sent again with the same id.
    -- `silenced`: matched a silence. `skipped`: the end of something that nobody was told of.
    status      text NOT NULL CHECK (status IN ('waiting', 'sending', 'delivered', 'silenced', 'skipped', 'failed')),
    -- Given with the first attempt, the same on every other.
    message_id  text COLLATE "C",
    attempts    integer NOT NULL DEFAULT 0,
    -- When to look at it again; null: when something happens, or never.
    due_at      timestamptz,
    -- Since when it should have been told.
    since       timestamptz NOT NULL,
    settled_at  timestamptz,
    silence_id  bigint,
    -- Why it failed, was not sent, or is tried again.
    reason      text CHECK (length(reason) <= 1000),
    PRIMARY KEY (receiver, alert_id, state)
);

CREATE INDEX gpu_notifications_due ON gpu_notifications (receiver, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX gpu_notifications_of_message ON gpu_notifications (receiver, message_id) WHERE status = 'sending';
CREATE INDEX gpu_notifications_of_alert ON gpu_notifications (alert_id);

-- What fits is not told. A silence that ended stays, for those who ask why nobody was told.
CREATE TABLE gpu_silences (
    silence_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- {label: pattern} or {label: [pattern, ...]}
    match       jsonb NOT NULL CHECK (jsonb_typeof(match) = 'object'),
    starts_at   timestamptz NOT NULL,
    ends_at     timestamptz NOT NULL CHECK (ends_at >= starts_at),
    comment     text NOT NULL CHECK (length(comment) <= 1000),
    created_by  text NOT NULL CHECK (length(created_by) <= 255),
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX gpu_silences_by_end ON gpu_silences (ends_at);
