/* A libnvidia-ml.so.1 that says what a text file says, so that the real pynvml binding is exercised without a GPU.
 *
 * The file named by NVML_STAND_IN is read again whenever it changes. Lines are KEY=VALUE:
 *
 *   gpus=2                      how many there are
 *   driver_version=550.54.15
 *   reloads=1                   the driver was reloaded: calls say UNINITIALIZED until the library is initialised again
 *   library=2                   the driver fits the library built with -DLIBRARY=2 only
 *   init=!9                     nvmlInit fails with that code
 *   gpu.0.power=350000          a value in NVML's unit; gpu.*.power holds for all that have none of their own
 *   gpu.0.power=!15             the call fails with that code; without a line it is NOT_SUPPORTED
 *   gpu.0.lost=1                every call says GPU_IS_LOST, and waiting for events does, too
 *   gpu.0.hang=60               asking for its power takes so many seconds, as a driver may that waits for a broken GPU
 *   gpu.0.mig=2                 MIG is on, with two instances: gpu.0.mig.1.uuid=…, gpu.0.mig.1.memory_used=…
 *   xid.1=0 79                  the first XID event: GPU and code, and for an instance its GPU and compute instance
 *
 * Every value that is asked for is written to the file named by NVML_STAND_IN_CALLS, if there is one: `0 power`.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#ifndef LIBRARY
#define LIBRARY 1
#endif

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TIMED_OUT = 10, LOST = 15, MISMATCH = 18 };
enum { LINES = 4096, MIG_STEP = 1000 };
#define NO_INSTANCE 0xFFFFFFFFu

typedef unsigned long long wide;
typedef struct device { int unused; } *device;
typedef struct { wide registered; int seen; } event_set;
typedef struct { device gpu; wide type, data; unsigned gpu_instance, compute_instance; } event_data;
typedef struct { unsigned id, scope; int64_t time, latency; unsigned type; int result; wide value; } field_value;
typedef struct { wide total, free, used; } memory_v1;
typedef struct { unsigned version; wide total, reserved, free, used; } memory_v2;
typedef struct { unsigned version, sensor; int temperature; } temperature_v1;
typedef struct { unsigned version; int margin; } margin_v1;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_info;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct line { char *key, *text; } table[LINES]; /* by key */
static int lines, initialised, reloads_at_init;
static struct timespec changed;

static int by_key(const void *one, const void *other) {
    return strcmp(((const struct line *)one)->key, ((const struct line *)other)->key);
}

static void read_script(void) {
    const char *path = getenv("NVML_STAND_IN");
    struct stat now;
    if (!path || stat(path, &now) || !memcmp(&now.st_mtim, &changed, sizeof changed)) return;
    FILE *file = fopen(path, "r");
    if (!file) return;
    changed = now.st_mtim;
    for (int i = 0; i < lines; i++) { free(table[i].key); free(table[i].text); }
    lines = 0;
    char line[512];
    while (lines < LINES && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *equals = strchr(line, '=');
        if (!equals) continue;
        *equals = 0;
        table[lines++] = (struct line){strdup(line), strdup(equals + 1)};
    }
    fclose(file);
    qsort(table, (size_t)lines, sizeof *table, by_key);
}

/* A copy for the calling thread: the script may be read again by another. */
static const char *text_of(const char *key) {
    static _Thread_local char copy[512];
    const struct line wanted = {(char *)key, NULL};
    pthread_mutex_lock(&lock);
    read_script();
    const struct line *found = bsearch(&wanted, table, (size_t)lines, sizeof *table, by_key);
    const char *text = found ? strcpy(copy, found->text) : NULL;
    pthread_mutex_unlock(&lock);
    return text;
}

static const char *text(const char *format, ...) {
    char key[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(key, sizeof key, format, arguments);
    va_end(arguments);
    return text_of(key);
}

static int number(const char *found, int otherwise) { return found ? atoi(found) : otherwise; }

static int driver(void) {
    if (number(text("library"), LIBRARY) != LIBRARY) return MISMATCH;
    return initialised && number(text("reloads"), 0) == reloads_at_init ? OK : UNINITIALIZED;
}

static int gpu_of(device gpu) { return (int)((intptr_t)gpu / MIG_STEP) - 1; }
static int instance_of(device gpu) { return (int)((intptr_t)gpu % MIG_STEP) - 1; }
static device handle(int gpu, int instance) { return (device)(intptr_t)((gpu + 1) * MIG_STEP + instance + 1); }

static int find(device gpu, const char *name, const char **found) {
    int index = gpu_of(gpu), instance = instance_of(gpu), result = driver();
    const char *calls = getenv("NVML_STAND_IN_CALLS");
    if (calls) {
        FILE *file = fopen(calls, "a");
        if (file) { fprintf(file, "%d %s\n", index, name); fclose(file); }
    }
    if (result) return result;
    if (number(text("gpu.%d.lost", index), 0)) return LOST;
    if (instance >= 0)
        *found = text("gpu.%d.mig.%d.%s", index, instance, name);
    else if (!(*found = text("gpu.%d.%s", index, name)))
        *found = text("gpu.*.%s", name);
    if (!*found) return UNSUPPORTED;
    return **found == '!' ? atoi(*found + 1) : OK;
}

static int value(device gpu, const char *name, wide *out) {
    const char *found;
    int result = find(gpu, name, &found);
    if (!result) *out = strtoull(found, NULL, 10);
    return result;
}

static int narrow(device gpu, const char *name, unsigned *out) {
    wide found;
    int result = value(gpu, name, &found);
    if (!result) *out = (unsigned)found;
    return result;
}

static int words(device gpu, const char *name, char *out, unsigned size) {
    const char *found;
    int result = find(gpu, name, &found);
    if (!result) snprintf(out, size, "%s", found);
    return result;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    const char *failure = text("init");
    if (failure) return atoi(failure + 1);
    if (number(text("library"), LIBRARY) != LIBRARY) return MISMATCH;
    reloads_at_init = number(text("reloads"), 0);
    initialised = 1;
    return OK;
}

int nvmlShutdown(void) {
    int result = initialised ? OK : UNINITIALIZED;
    initialised = 0;
    return result;
}

const char *nvmlErrorString(int code) {
    static char told[32];
    snprintf(told, sizeof told, "code %d", code);
    return told;
}

int nvmlSystemGetDriverVersion(char *out, unsigned size) {
    if (driver()) return driver();
    const char *found = text("driver_version");
    snprintf(out, size, "%s", found ? found : "550.54.15");
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    *out = (unsigned)number(text("gpus"), 0);
    return driver();
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out) {
    if (driver()) return driver();
    if ((int)index >= number(text("gpus"), 0)) return INVALID;
    *out = handle((int)index, -1);
    return number(text("gpu.%d.lost", (int)index), 0) ? LOST : OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device *out) {
    if (driver()) return driver();
    for (int index = 0; index < number(text("gpus"), 0); index++) {
        const char *found = text("gpu.%d.uuid", index);
        if (found && !strcmp(found, uuid)) { *out = handle(index, -1); return OK; }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(device gpu, char *out, unsigned size) { return words(gpu, "uuid", out, size); }
int nvmlDeviceGetName(device gpu, char *out, unsigned size) { return words(gpu, "name", out, size); }
int nvmlDeviceGetMinorNumber(device gpu, unsigned *out) { *out = (unsigned)gpu_of(gpu); return driver(); }

int nvmlDeviceGetPciInfo_v3(device gpu, pci_info *out) {
    memset(out, 0, sizeof *out);
    return words(gpu, "pci_bus_id", out->bus_id, sizeof out->bus_id);
}

int nvmlDeviceGetClockInfo(device gpu, unsigned type, unsigned *out) {
    return narrow(gpu, type == 1 ? "sm_clock" : "memory_clock", out);
}
int nvmlDeviceGetCurrentClocksEventReasons(device gpu, wide *out) { return value(gpu, "clock_events", out); }
int nvmlDeviceGetCurrentClocksThrottleReasons(device gpu, wide *out) { return value(gpu, "clock_throttle", out); }
int nvmlDeviceGetTemperature(device gpu, unsigned sensor, unsigned *out) { (void)sensor; return narrow(gpu, "temperature_old", out); }
int nvmlDeviceGetPowerUsage(device gpu, unsigned *out) {
    const struct timespec hang = {number(text("gpu.%d.hang", gpu_of(gpu)), 0), 0};
    const char *unused;
    if (hang.tv_sec) find(gpu, "hang", &unused); /* to be seen among the calls */
    nanosleep(&hang, NULL);
    return narrow(gpu, "power", out);
}
int nvmlDeviceGetTotalEnergyConsumption(device gpu, wide *out) { return value(gpu, "energy", out); }
int nvmlDeviceGetEnforcedPowerLimit(device gpu, unsigned *out) { return narrow(gpu, "power_limit", out); }
int nvmlDeviceGetPerformanceState(device gpu, unsigned *out) { return narrow(gpu, "pstate", out); }
int nvmlDeviceGetFanSpeed(device gpu, unsigned *out) { return narrow(gpu, "fan", out); }
int nvmlDeviceGetPcieReplayCounter(device gpu, unsigned *out) { return narrow(gpu, "pcie_replays_old", out); }
int nvmlDeviceGetTemperatureThreshold(device gpu, unsigned type, unsigned *out) {
    return narrow(gpu, type ? "slowdown" : "shutdown", out);
}
int nvmlDeviceGetTemperatureV(device gpu, temperature_v1 *out) { return narrow(gpu, "temperature", (unsigned *)&out->temperature); }
int nvmlDeviceGetMarginTemperature(device gpu, margin_v1 *out) { return narrow(gpu, "margin", (unsigned *)&out->margin); }

int nvmlDeviceGetUtilizationRates(device gpu, unsigned out[2]) {
    int result = narrow(gpu, "utilization", &out[0]);
    return result ? result : narrow(gpu, "memory_utilization", &out[1]);
}
int nvmlDeviceGetEncoderUtilization(device gpu, unsigned *out, unsigned *period) { *period = 167000; return narrow(gpu, "encoder", out); }
int nvmlDeviceGetDecoderUtilization(device gpu, unsigned *out, unsigned *period) { *period = 167000; return narrow(gpu, "decoder", out); }

int nvmlDeviceGetMemoryInfo(device gpu, memory_v1 *out) {
    int result = value(gpu, "memory_total", &out->total);
    if (!result) result = value(gpu, "memory_used", &out->used);
    out->free = out->total - out->used;
    return result;
}
int nvmlDeviceGetMemoryInfo_v2(device gpu, memory_v2 *out) {
    int result = value(gpu, "memory_reserved", &out->reserved);
    if (!result) result = value(gpu, "memory_total", &out->total);
    if (!result) result = value(gpu, "memory_used", &out->used);
    out->free = out->total - out->used - out->reserved;
    return result;
}

int nvmlDeviceGetTotalEccErrors(device gpu, unsigned type, unsigned counter, wide *out) {
    (void)counter;
    return value(gpu, type ? "ecc_uncorrected_old" : "ecc_corrected_old", out);
}
int nvmlDeviceGetRemappedRows(device gpu, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    int result = narrow(gpu, "rows_old", corrected);
    *uncorrected = 0; *pending = 1; *failed = 0;
    return result;
}

int nvmlDeviceGetFieldValues(device gpu, int count, field_value *fields) {
    static const struct { unsigned id; const char *name; } names[] = {
        {3, "ecc_corrected"}, {4, "ecc_uncorrected"}, {5, "ecc_corrected_lifetime"}, {6, "ecc_uncorrected_lifetime"},
        {29, "pages_corrected"}, {30, "pages_uncorrected"}, {31, "pages_pending"}, {38, "nvlink_flit"},
        {45, "nvlink_data"}, {52, "nvlink_replay"}, {59, "nvlink_recovery"}, {74, "power_violation"},
        {75, "thermal_violation"}, {82, "memory_temperature"}, {83, "energy"}, {94, "pcie_replays"},
        {142, "rows_corrected"}, {143, "rows_uncorrected"}, {144, "rows_pending"}, {145, "rows_failed"},
        {186, "power_instant"},
    };
    if (driver()) return driver();
    if (number(text("gpu.%d.lost", gpu_of(gpu)), 0)) return LOST;
    for (int i = 0; i < count; i++) {
        fields[i].result = UNSUPPORTED;
        fields[i].type = 3; /* unsigned long long */
        for (size_t j = 0; j < sizeof names / sizeof *names; j++)
            if (names[j].id == fields[i].id) fields[i].result = value(gpu, names[j].name, &fields[i].value);
    }
    return OK;
}

int nvmlDeviceGetMigMode(device gpu, unsigned *current, unsigned *pending) {
    int result = narrow(gpu, "mig", current);
    if (!result) *current = *pending = *current > 0;
    return result;
}
int nvmlDeviceGetMaxMigDeviceCount(device gpu, unsigned *out) { return narrow(gpu, "mig", out); }
int nvmlDeviceGetMigDeviceHandleByIndex(device gpu, unsigned index, device *out) {
    if (driver()) return driver();
    if (number(text("gpu.%d.lost", gpu_of(gpu)), 0)) return LOST;
    *out = handle(gpu_of(gpu), (int)index);
    return text("gpu.%d.mig.%d.uuid", gpu_of(gpu), (int)index) ? OK : NOT_FOUND;
}
int nvmlDeviceGetGpuInstanceId(device gpu, unsigned *out) { return narrow(gpu, "gpu_instance", out); }
int nvmlDeviceGetComputeInstanceId(device gpu, unsigned *out) { return narrow(gpu, "compute_instance", out); }

int nvmlEventSetCreate(event_set **out) {
    if (driver()) return driver();
    *out = calloc(1, sizeof **out);
    while (text("xid.%d", (*out)->seen + 1)) (*out)->seen++;
    return OK;
}
int nvmlEventSetFree(event_set *set) { free(set); return OK; }
int nvmlDeviceRegisterEvents(device gpu, wide types, event_set *set) {
    const char *found;
    int result = find(gpu, "events", &found);
    if (result) return result;
    if (types & 8) set->registered |= 1ull << gpu_of(gpu);
    return OK;
}
int nvmlEventSetWait_v2(event_set *set, event_data *out, unsigned timeout) {
    const struct timespec pause = {0, 20000000};
    for (unsigned waited = 0; waited <= timeout; waited += 20) {
        if (driver()) return driver();
        for (int index = 0; index < number(text("gpus"), 0); index++)
            if (set->registered >> index & 1 && number(text("gpu.%d.lost", index), 0)) return LOST;
        const char *found = text("xid.%d", set->seen + 1);
        if (found) {
            int index = 0;
            out->gpu_instance = out->compute_instance = NO_INSTANCE;
            sscanf(found, "%d %llu %u %u", &index, &out->data, &out->gpu_instance, &out->compute_instance);
            set->seen++;
            out->gpu = handle(index, -1);
            out->type = 8;
            if (set->registered >> index & 1) return OK;
            continue;
        }
        nanosleep(&pause, NULL);
    }
    return TIMED_OUT;
}
