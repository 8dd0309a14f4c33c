-- GPU telemetry: what GPUs are, what they measured, closed windows, alerts, roll-ups.
--
-- Columns of `gpu_samples` and of the roll-ups are named after `pipeline/dcgm.py`, in its units; NULL: not known.
-- What is partitioned has a table per day or month, made by `record` before it is needed and dropped by retention.

CREATE TABLE gpus (
    gpu_id         integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    gpu_uuid       text COLLATE "C" NOT NULL UNIQUE CHECK (length(gpu_uuid) BETWEEN 1 AND 128),
    host           text COLLATE "C" NOT NULL,
    -- Key of its records: GPUs that share it are compared with each other.
    peer_key       text COLLATE "C" NOT NULL,
    index          integer,
    model          text COLLATE "C",
    device         text,
    pci_bus_id     text,
    -- Of a MIG instance: the GPU that it is a part of.
    parent_uuid    text COLLATE "C",
    driver_version text,
    labels         jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(labels) = 'object'),
    state          text NOT NULL DEFAULT 'ok' CHECK (state IN ('ok', 'lost')),
    -- Times of samples. The last is brought up to date every few seconds, not with every sample.
    first_seen     timestamptz NOT NULL,
    last_seen      timestamptz NOT NULL,
    -- Another host that names the same UUID while this one does too, when it last did, and how many batches it did.
    conflict_host  text,
    conflict_at    timestamptz,
    conflicts      bigint NOT NULL DEFAULT 0
);

CREATE INDEX gpus_by_host ON gpus (host, gpu_uuid);

-- The first sample of a GPU and a time stays. A partition per day (UTC): gpu_samples_20260131.
CREATE TABLE gpu_samples (
    time           timestamptz NOT NULL,
    sm_clock_mhz double precision,
    memory_clock_mhz double precision,
    clock_event_reasons double precision,
    memory_temperature_celsius double precision,
    temperature_celsius double precision,
    temperature_margin_celsius double precision,
    power_watts double precision,
    energy_millijoules double precision,
    power_instant_watts double precision,
    slowdown_temperature_celsius double precision,
    shutdown_temperature_celsius double precision,
    power_limit_watts double precision,
    performance_state double precision,
    fan_speed_percent double precision,
    pcie_tx_kilobytes_per_second double precision,
    pcie_rx_kilobytes_per_second double precision,
    pcie_replays double precision,
    utilization_percent double precision,
    memory_copy_percent double precision,
    encoder_percent double precision,
    decoder_percent double precision,
    last_xid double precision,
    power_violation_nanoseconds double precision,
    thermal_violation_nanoseconds double precision,
    memory_total_mebibytes double precision,
    memory_free_mebibytes double precision,
    memory_used_mebibytes double precision,
    memory_reserved_mebibytes double precision,
    ecc_corrected_volatile double precision,
    ecc_uncorrected_volatile double precision,
    ecc_corrected_lifetime double precision,
    ecc_uncorrected_lifetime double precision,
    pages_retired_corrected double precision,
    pages_retired_uncorrected double precision,
    pages_retired_pending double precision,
    rows_remapped_uncorrected double precision,
    rows_remapped_corrected double precision,
    row_remap_failed double precision,
    row_remap_pending double precision,
    nvlink_crc_flit_errors double precision,
    nvlink_crc_data_errors double precision,
    nvlink_replays double precision,
    nvlink_recoveries double precision,
    nvlink_bandwidth double precision,
    graphics_engine_ratio double precision,
    sm_active_ratio double precision,
    sm_occupancy_ratio double precision,
    tensor_active_ratio double precision,
    dram_active_ratio double precision,
    pcie_tx_bytes_per_second double precision,
    pcie_rx_bytes_per_second double precision,
    nvlink_tx_bytes_per_second double precision,
    nvlink_rx_bytes_per_second double precision,
    gpu_id         integer NOT NULL,
    lost           boolean NOT NULL DEFAULT false,
    -- Of a replay: when the source says that this was.
    source_time    timestamptz,
    xids           integer[],
    -- Fields that `pipeline/dcgm.py` does not know, by their own names.
    other          jsonb,
    PRIMARY KEY (gpu_id, time)
) PARTITION BY RANGE (time);

-- A window of zero length is an event, such as an XID error. A partition per day of its start.
CREATE TABLE gpu_windows (
    gpu_id         integer NOT NULL,
    start_time     timestamptz NOT NULL,
    end_time       timestamptz NOT NULL CHECK (end_time >= start_time),
    samples        integer NOT NULL,
    -- {field: [count, minimum, maximum, mean, last]}
    aggregates     jsonb NOT NULL,
    -- {detector: score}
    scores         jsonb NOT NULL,
    -- [Condition]: all that held, see `pipeline/telemetry.py`.
    conditions     jsonb NOT NULL,
    xids           integer[],
    rules_version  text NOT NULL,
    PRIMARY KEY (gpu_id, start_time, end_time)
) PARTITION BY RANGE (start_time);

-- Up to where the alerts of a GPU follow its windows; whoever changes them locks its row.
CREATE TABLE gpu_progress (
    gpu_id         integer PRIMARY KEY,
    reconciled     timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 50);

CREATE TABLE gpu_alerts (
    alert_id       text COLLATE "C" PRIMARY KEY CHECK (length(alert_id) BETWEEN 1 AND 128),
    gpu_id         integer NOT NULL,
    gpu_uuid       text COLLATE "C" NOT NULL,
    host           text COLLATE "C" NOT NULL,
    model          text COLLATE "C",
    rule           text COLLATE "C" NOT NULL,
    severity       text NOT NULL CHECK (severity IN ('info', 'warning', 'critical')),
    -- `resolved` without `fired_at`: it ended before it had held for as long as its rule asks.
    state          text NOT NULL CHECK (state IN ('pending', 'firing', 'resolved')),
    -- Times of windows: the first with the condition, the last one seen with it, and when each state began.
    since          timestamptz NOT NULL,
    seen_at        timestamptz NOT NULL,
    fired_at       timestamptz,
    resolved_at    timestamptz,
    -- As it was last seen.
    condition      jsonb NOT NULL CHECK (jsonb_typeof(condition) = 'object'),
    CHECK ((state = 'resolved') = (resolved_at IS NOT NULL))
);

CREATE INDEX gpu_alerts_open ON gpu_alerts (gpu_id) WHERE state <> 'resolved';
CREATE INDEX gpu_alerts_by_gpu ON gpu_alerts (gpu_id, since DESC, alert_id);
CREATE INDEX gpu_alerts_by_age ON gpu_alerts (since DESC, alert_id);

-- Steps in the life of alerts that `gpu.alerts.v1` does not have yet, in the order of `position` per alert.
CREATE TABLE gpu_alert_outbox (
    position       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    alert_id       text COLLATE "C" NOT NULL,
    state          text NOT NULL,
    -- A record of the topic, whole.
    value          bytea NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (alert_id, state)
);

-- A GPU's samples of one minute. A partition per month.
CREATE TABLE gpu_minutes (
    gpu_id         integer NOT NULL,
    time           timestamptz NOT NULL,
    samples        integer NOT NULL,
    -- Between samples that are at most five minutes apart: time seen, of it idle, and energy.
    seconds        double precision NOT NULL,
    idle_seconds   double precision NOT NULL,
    joules         double precision,
    xids           integer[],
    sm_clock_mhz_count integer, sm_clock_mhz_min double precision, sm_clock_mhz_max double precision, sm_clock_mhz_mean double precision,
    memory_clock_mhz_count integer, memory_clock_mhz_min double precision, memory_clock_mhz_max double precision, memory_clock_mhz_mean double precision,
    clock_event_reasons_count integer, clock_event_reasons_min double precision, clock_event_reasons_max double precision,
    memory_temperature_celsius_count integer, memory_temperature_celsius_min double precision, memory_temperature_celsius_max double precision, memory_temperature_celsius_mean double precision,
    temperature_celsius_count integer, temperature_celsius_min double precision, temperature_celsius_max double precision, temperature_celsius_mean double precision,
    temperature_margin_celsius_count integer, temperature_margin_celsius_min double precision, temperature_margin_celsius_max double precision, temperature_margin_celsius_mean double precision,
    power_watts_count integer, power_watts_min double precision, power_watts_max double precision, power_watts_mean double precision,
    energy_millijoules_count integer, energy_millijoules_min double precision, energy_millijoules_max double precision,
    power_instant_watts_count integer, power_instant_watts_min double precision, power_instant_watts_max double precision, power_instant_watts_mean double precision,
    slowdown_temperature_celsius_count integer, slowdown_temperature_celsius_min double precision, slowdown_temperature_celsius_max double precision, slowdown_temperature_celsius_mean double precision,
    shutdown_temperature_celsius_count integer, shutdown_temperature_celsius_min double precision, shutdown_temperature_celsius_max double precision, shutdown_temperature_celsius_mean double precision,
    power_limit_watts_count integer, power_limit_watts_min double precision, power_limit_watts_max double precision, power_limit_watts_mean double precision,
    performance_state_count integer, performance_state_min double precision, performance_state_max double precision,
    fan_speed_percent_count integer, fan_speed_percent_min double precision, fan_speed_percent_max double precision, fan_speed_percent_mean double precision,
    pcie_tx_kilobytes_per_second_count integer, pcie_tx_kilobytes_per_second_min double precision, pcie_tx_kilobytes_per_second_max double precision, pcie_tx_kilobytes_per_second_mean double precision,
    pcie_rx_kilobytes_per_second_count integer, pcie_rx_kilobytes_per_second_min double precision, pcie_rx_kilobytes_per_second_max double precision, pcie_rx_kilobytes_per_second_mean double precision,
    pcie_replays_count integer, pcie_replays_min double precision, pcie_replays_max double precision,
    utilization_percent_count integer, utilization_percent_min double precision, utilization_percent_max double precision, utilization_percent_mean double precision,
    memory_copy_percent_count integer, memory_copy_percent_min double precision, memory_copy_percent_max double precision, memory_copy_percent_mean double precision,
    encoder_percent_count integer, encoder_percent_min double precision, encoder_percent_max double precision, encoder_percent_mean double precision,
    decoder_percent_count integer, decoder_percent_min double precision, decoder_percent_max double precision, decoder_percent_mean double precision,
    last_xid_count integer, last_xid_min double precision, last_xid_max double precision,
    power_violation_nanoseconds_count integer, power_violation_nanoseconds_min double precision, power_violation_nanoseconds_max double precision,
    thermal_violation_nanoseconds_count integer, thermal_violation_nanoseconds_min double precision, thermal_violation_nanoseconds_max double precision,
    memory_total_mebibytes_count integer, memory_total_mebibytes_min double precision, memory_total_mebibytes_max double precision, memory_total_mebibytes_mean double precision,
    memory_free_mebibytes_count integer, memory_free_mebibytes_min double precision, memory_free_mebibytes_max double precision, memory_free_mebibytes_mean double precision,
    memory_used_mebibytes_count integer, memory_used_mebibytes_min double precision, memory_used_mebibytes_max double precision, memory_used_mebibytes_mean double precision,
    memory_reserved_mebibytes_count integer, memory_reserved_mebibytes_min double precision, memory_reserved_mebibytes_max double precision, memory_reserved_mebibytes_mean double precision,
    ecc_corrected_volatile_count integer, ecc_corrected_volatile_min double precision, ecc_corrected_volatile_max double precision,
    ecc_uncorrected_volatile_count integer, ecc_uncorrected_volatile_min double precision, ecc_uncorrected_volatile_max double precision,
    ecc_corrected_lifetime_count integer, ecc_corrected_lifetime_min double precision, ecc_corrected_lifetime_max double precision,
    ecc_uncorrected_lifetime_count integer, ecc_uncorrected_lifetime_min double precision, ecc_uncorrected_lifetime_max double precision,
    pages_retired_corrected_count integer, pages_retired_corrected_min double precision, pages_retired_corrected_max double precision,
    pages_retired_uncorrected_count integer, pages_retired_uncorrected_min double precision, pages_retired_uncorrected_max double precision,
    pages_retired_pending_count integer, pages_retired_pending_min double precision, pages_retired_pending_max double precision, pages_retired_pending_mean double precision,
    rows_remapped_uncorrected_count integer, rows_remapped_uncorrected_min double precision, rows_remapped_uncorrected_max double precision,
    rows_remapped_corrected_count integer, rows_remapped_corrected_min double precision, rows_remapped_corrected_max double precision,
    row_remap_failed_count integer, row_remap_failed_min double precision, row_remap_failed_max double precision,
    row_remap_pending_count integer, row_remap_pending_min double precision, row_remap_pending_max double precision,
    nvlink_crc_flit_errors_count integer, nvlink_crc_flit_errors_min double precision, nvlink_crc_flit_errors_max double precision,
    nvlink_crc_data_errors_count integer, nvlink_crc_data_errors_min double precision, nvlink_crc_data_errors_max double precision,
    nvlink_replays_count integer, nvlink_replays_min double precision, nvlink_replays_max double precision,
    nvlink_recoveries_count integer, nvlink_recoveries_min double precision, nvlink_recoveries_max double precision,
    nvlink_bandwidth_count integer, nvlink_bandwidth_min double precision, nvlink_bandwidth_max double precision, nvlink_bandwidth_mean double precision,
    graphics_engine_ratio_count integer, graphics_engine_ratio_min double precision, graphics_engine_ratio_max double precision, graphics_engine_ratio_mean double precision,
    sm_active_ratio_count integer, sm_active_ratio_min double precision, sm_active_ratio_max double precision, sm_active_ratio_mean double precision,
    sm_occupancy_ratio_count integer, sm_occupancy_ratio_min double precision, sm_occupancy_ratio_max double precision, sm_occupancy_ratio_mean double precision,
    tensor_active_ratio_count integer, tensor_active_ratio_min double precision, tensor_active_ratio_max double precision, tensor_active_ratio_mean double precision,
    dram_active_ratio_count integer, dram_active_ratio_min double precision, dram_active_ratio_max double precision, dram_active_ratio_mean double precision,
    pcie_tx_bytes_per_second_count integer, pcie_tx_bytes_per_second_min double precision, pcie_tx_bytes_per_second_max double precision, pcie_tx_bytes_per_second_mean double precision,
    pcie_rx_bytes_per_second_count integer, pcie_rx_bytes_per_second_min double precision, pcie_rx_bytes_per_second_max double precision, pcie_rx_bytes_per_second_mean double precision,
    nvlink_tx_bytes_per_second_count integer, nvlink_tx_bytes_per_second_min double precision, nvlink_tx_bytes_per_second_max double precision, nvlink_tx_bytes_per_second_mean double precision,
    nvlink_rx_bytes_per_second_count integer, nvlink_rx_bytes_per_second_min double precision, nvlink_rx_bytes_per_second_max double precision, nvlink_rx_bytes_per_second_mean double precision,
    PRIMARY KEY (gpu_id, time)
) PARTITION BY RANGE (time);

-- A GPU's samples of one hour, made from its minutes. A partition per month.
CREATE TABLE gpu_hours (LIKE gpu_minutes INCLUDING ALL) PARTITION BY RANGE (time);

-- Minutes and hours whose roll-up is not right yet.
CREATE TABLE gpu_rollups_due (
    position       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    step           text NOT NULL CHECK (step IN ('minute', 'hour')),
    time           timestamptz NOT NULL,
    gpu_ids        integer[] NOT NULL,
    marked_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX gpu_rollups_due_by_time ON gpu_rollups_due (step, time);
