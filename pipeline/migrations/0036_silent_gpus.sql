-- When a GPU had its last window, or the last hour that counts as silent; and how many of those since.
ALTER TABLE gpu_progress
    ADD COLUMN touched_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN silent_hours integer NOT NULL DEFAULT 0;
