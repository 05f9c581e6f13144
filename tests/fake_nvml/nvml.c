/*
 * A libnvidia-ml.so.1 for tests: no GPU, no driver, only what a text file says.
 *
 * FAKE_NVML_CONTROL names the file. It is read again whenever it was replaced:
 *
 *   driver 570.1                 the driver's version
 *   init_error 9                 what nvmlInit answers (0: it works)
 *   system_hang SystemGetDriverVersion
 *                                the call of NVML as a whole that does not return: nvml<Name>
 *   wait_error 999               what the wait for events answers at once (0: it works)
 *   limits_backend dmem          who keeps memory limits: misc, a map of the driver's own, or dmem,
 *                                the kernel: for cgroups with a file dmem.max
 *   card uuid=GPU-a name="NVIDIA L4" memory=24576 ...
 *                                a card; memory in MiB, the fields are in struct card
 *                                compute=12:512,13:- are its processes, a PID and the MiB that it
 *                                has each, mps=... those of its clients of MPS
 *   event 7 GPU-a 79             XID 79 on that card; "-" is a card that cannot be told
 *   action_event 8 GPU-a         the card's recovery action has changed
 *
 *                                `call=Name` limits its hang and call_error to one call: nvml<Name>
 *
 * "-" as a number or a list means that the card does not offer the value. Every event has a number of its
 * own and is delivered once per process, as soon as a thread waits with the card in its event set
 * (NVML would lose what comes earlier; a test could not tell when to send it). Those in the file at
 * the first nvmlInit are of the past.
 *
 * FAKE_NVML_LOG names a file to which a line is added for every compute mode that is set:
 * `compute_mode GPU-a 3`. The last one for a card is its mode, in every process, whatever the
 * control file says.
 *
 * FAKE_NVML_LIMITS names a file that holds the memory limits of cgroups, for every process: a record
 * for each that is set, and for each use that a test appends, of which the last one counts. Paths
 * are as realpath(3) has them, and may hold whatever a path may:
 *
 *   limit GPU-a 0 1048576 3\n/pa\n   soft and hard limit in bytes, how long the path is, the path
 *   used GPU-a 4096 0 3\n/pa\n       bytes that the processes of that cgroup have
 *
 * A process with FAKE_NVML_UNPRIVILEGED in its environment cannot set any. What NVML answers to a
 * path that is no directory is not known; here it is NOT_FOUND where nothing is there, and else
 * INVALID_ARGUMENT. Built with -DNO_MEMORY_LIMITS the library lacks these calls, as older ones do.
 *
 * As in NVML, the cards are those of the first nvmlInit until the last nvmlShutdown. One that has
 * left the file since then, or whose `epoch` is not that of the handle, answers GPU_IS_LOST. A
 * shutdown while a thread waits for events is a crash waiting to happen: here it always does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <libgen.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef int nvmlReturn_t;

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    FUNCTION_NOT_FOUND = 13,
    GPU_IS_LOST = 15,
    VERSION_MISMATCH = 25,
};

enum {
    MAX_CARDS = 32,
    MAX_EVENTS = 4096,
    MAX_HANDLES = 4096,
    MAX_PROCESSES = 64,
    NONE = -1,             /* the value is not offered */
    UNCORRECTED = 1,
    VALUE_UNSIGNED_INT = 1,
    FIELD_RECOVERY_ACTION = 230,
    MEMORY_V2 = 0x02000028,
    EVENT_XID = 0x8,
    EVENT_RECOVERY_ACTION = 0x8000,
    LIMITS_DRIVER = 615,   /* the first that can limit memory */
};

struct process {
    long long pid, memory; /* MiB */
};

struct processes {
    int count; /* NONE: the card has no such list */
    struct process process[MAX_PROCESSES];
};

struct card {
    char uuid[96], name[96], bus[32];
    long long memory, reserved, used; /* MiB */
    int major, minor;
    long long mig;           /* 0, 1 */
    long long compute_mode;
    long long set_mode_error; /* what setting it answers */
    long long handle_error;  /* what asking for a handle answers */
    long long lost;          /* every call answers GPU_IS_LOST */
    long long error;         /* what the memory calls answer */
    long long ecc;           /* uncorrectable errors */
    long long remap_failed, remap_pending;
    long long action;        /* recovery action */
    struct processes compute, mps;
    long long compute_error, mps_error; /* what asking for the list answers */
    long long process_v3;    /* 0: only the second version of these calls works */
    double list_hang;        /* seconds that these calls take, until the file says 0 */
    long long energy;        /* mJ since the driver initialised the card */
    long long events;        /* event types that the card supports, as a mask */
    long long memory_v2;     /* 0: only the first version of the memory call works */
    long long limits_error;  /* what asking for memory limits and setting them answers */
    long long set_limits_error; /* what setting them does */
    long long epoch;         /* grows when the card was enumerated anew */
    double hang;             /* seconds that every call takes, until the file says 0 */
    long long call_error;    /* what every call answers */
    char call[96];           /* the one call that hangs or fails, "-": all */
};

struct event {
    long long number, xid;
    int type;
    char uuid[96]; /* "-": not known */
};

struct control {
    char driver[80];
    int init_error, wait_error;
    char system_hang[96];
    bool dmem; /* the kernel keeps memory limits */
    int cards, events;
    struct card card[MAX_CARDS];
    struct event event[MAX_EVENTS];
};

struct nvmlDevice_st {
    char uuid[96];
    long long epoch;
    int session;
};
typedef struct nvmlDevice_st *nvmlDevice_t;

struct nvmlEventSet_st {
    int count;
    nvmlDevice_t device[MAX_CARDS];
    unsigned long long types[MAX_CARDS];
};
typedef struct nvmlEventSet_st *nvmlEventSet_t;

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef struct {
    unsigned int version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;

typedef struct {
    char busIdLegacy[16];
    unsigned int domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;

typedef struct {
    unsigned int fieldId, scopeId;
    long long timestamp, latencyUsec;
    unsigned int valueType;
    nvmlReturn_t nvmlReturn;
    union {
        double dVal;
        unsigned int uiVal;
        unsigned long long ullVal;
    } value;
} nvmlFieldValue_t;

#define NOT_AVAILABLE (~0ULL)

typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

typedef struct {
    nvmlDevice_t device;
    unsigned long long eventType, eventData;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlEventData_t;

/* Everything below is guarded by `mutex`; nothing sleeps while it is held. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct control control;
static struct stat control_stat;
static bool control_read;
static int references, session, waiters;
static int enumerated;
static char enumerated_uuid[MAX_CARDS][96];
static struct nvmlDevice_st handle[MAX_HANDLES];
static int handles;
static bool delivered[MAX_EVENTS];
static bool past_is_known;

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("fake NVML: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    abort();
}

static void copy(char *to, size_t size, const char *from)
{
    size_t length = strlen(from);
    if (length >= size)
        fail("too long: %s", from);
    memcpy(to, from, length + 1);
}

static void sleep_ms(double milliseconds)
{
    struct timespec pause = {(time_t)(milliseconds / 1e3), 0};
    pause.tv_nsec = (long)((milliseconds - (double)pause.tv_sec * 1e3) * 1e6);
    nanosleep(&pause, NULL);
}

static double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

/* The control file */

static long long number(const char *text)
{
    char *end;
    long long value;
    if (strcmp(text, "-") == 0)
        return NONE;
    value = strtoll(text, &end, 10);
    if (*end != '\0' || end == text)
        fail("not a number: %s", text);
    return value;
}

static void parse_processes(struct processes *processes, const char *value)
{
    char *words = strdup(value), *rest = words, *word;

    if (words == NULL)
        fail("no memory");
    processes->count = strcmp(value, "-") == 0 ? NONE : 0;
    while (processes->count != NONE && (word = strsep(&rest, ",")) != NULL && *word != '\0') {
        char *memory = strchr(word, ':');
        if (memory == NULL || processes->count == MAX_PROCESSES)
            fail("not processes: %s", value);
        *memory++ = '\0';
        processes->process[processes->count].pid = number(word);
        processes->process[processes->count++].memory = number(memory);
    }
    free(words);
}

static void set_field(struct card *card, const char *key, const char *value)
{
    const struct {
        const char *key;
        long long *value;
    } numbers[] = {
#define FIELD(name) {#name, &card->name}
        FIELD(memory), FIELD(reserved), FIELD(used), FIELD(mig), FIELD(compute_mode),
        FIELD(set_mode_error), FIELD(handle_error), FIELD(lost), FIELD(error), FIELD(ecc), FIELD(remap_failed),
        FIELD(remap_pending), FIELD(action), FIELD(energy), FIELD(compute_error), FIELD(mps_error),
        FIELD(process_v3), FIELD(events), FIELD(memory_v2), FIELD(epoch), FIELD(call_error),
        FIELD(limits_error), FIELD(set_limits_error),
    };
    size_t i;

    for (i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (strcmp(key, numbers[i].key) == 0) {
            *numbers[i].value = number(value);
            return;
        }
    if (strcmp(key, "uuid") == 0)
        copy(card->uuid, sizeof card->uuid, value);
    else if (strcmp(key, "name") == 0)
        copy(card->name, sizeof card->name, value);
    else if (strcmp(key, "bus") == 0)
        copy(card->bus, sizeof card->bus, value);
    else if (strcmp(key, "cc") == 0) {
        if (sscanf(value, "%d.%d", &card->major, &card->minor) != 2)
            fail("not a compute capability: %s", value);
    } else if (strcmp(key, "compute") == 0)
        parse_processes(&card->compute, value);
    else if (strcmp(key, "mps") == 0)
        parse_processes(&card->mps, value);
    else if (strcmp(key, "hang") == 0)
        card->hang = strtod(value, NULL);
    else if (strcmp(key, "call") == 0)
        copy(card->call, sizeof card->call, value);
    else if (strcmp(key, "list_hang") == 0)
        card->list_hang = strtod(value, NULL);
    else
        fail("unknown field of a card: %s", key);
}

static void parse_card(char *rest)
{
    struct card *card = &control.card[control.cards];

    if (control.cards++ == MAX_CARDS)
        fail("too many cards");
    memset(card, 0, sizeof *card);
    card->memory_v2 = card->process_v3 = 1;
    for (;;) {
        char *key, *value;
        rest += strspn(rest, " ");
        if (*rest == '\0')
            break;
        key = rest;
        rest = strchr(rest, '=');
        if (rest == NULL)
            fail("no value: %s", key);
        *rest++ = '\0';
        value = rest;
        if (*value == '"') {
            rest = strchr(++value, '"');
            if (rest == NULL)
                fail("no closing quote: %s", value);
            *rest++ = '\0';
        }
        rest += strcspn(rest, " ");
        if (*rest != '\0')
            *rest++ = '\0';
        set_field(card, key, value);
    }
}

static void parse_event(char *line)
{
    struct event *event = &control.event[control.events];

    if (control.events++ == MAX_EVENTS)
        fail("too many events");
    memset(event, 0, sizeof *event);
    if (sscanf(line, "event %lld %95s %lld", &event->number, event->uuid, &event->xid) == 3)
        event->type = EVENT_XID;
    else if (sscanf(line, "action_event %lld %95s", &event->number, event->uuid) == 2)
        event->type = EVENT_RECOVERY_ACTION;
    else
        fail("not an event: %s", line);
    if (event->number < 0 || event->number >= MAX_EVENTS)
        fail("number of an event out of range: %s", line);
}

/* Whether there is a control file; reads it if it is not the one that was read last. */
static bool refresh(void)
{
    const char *path = getenv("FAKE_NVML_CONTROL");
    struct stat found;
    char *line = NULL;
    size_t size = 0;
    FILE *file;

    if (path == NULL || stat(path, &found) != 0)
        return false;
    if (control_read && found.st_ino == control_stat.st_ino &&
        found.st_size == control_stat.st_size &&
        found.st_mtim.tv_sec == control_stat.st_mtim.tv_sec &&
        found.st_mtim.tv_nsec == control_stat.st_mtim.tv_nsec)
        return true;
    file = fopen(path, "re");
    if (file == NULL)
        return false;
    /* What is read is what was opened, also if the file was replaced after the stat above. */
    if (fstat(fileno(file), &control_stat) != 0)
        fail("cannot stat %s", path);
    control_read = true;
    control.cards = control.events = control.init_error = control.wait_error = 0;
    control.system_hang[0] = '\0';
    control.dmem = false;
    copy(control.driver, sizeof control.driver, "570.1");
    while (getline(&line, &size, file) > 0) {
        line[strcspn(line, "\n")] = '\0';
        if (strncmp(line, "driver ", 7) == 0)
            copy(control.driver, sizeof control.driver, line + 7);
        else if (strncmp(line, "init_error ", 11) == 0)
            control.init_error = (int)number(line + 11);
        else if (strncmp(line, "wait_error ", 11) == 0)
            control.wait_error = (int)number(line + 11);
        else if (strncmp(line, "system_hang ", 12) == 0)
            copy(control.system_hang, sizeof control.system_hang, line + 12);
        else if (strncmp(line, "limits_backend ", 15) == 0)
            control.dmem = strcmp(line + 15, "dmem") == 0;
        else if (strncmp(line, "card ", 5) == 0)
            parse_card(line + 5);
        else if (strstr(line, "event ") != NULL)
            parse_event(line);
        else if (line[0] != '\0' && line[0] != '#')
            fail("unknown line: %s", line);
    }
    free(line);
    fclose(file);
    return true;
}

static struct card *find_card(const char *uuid)
{
    int i;
    for (i = 0; i < control.cards; i++)
        if (strcmp(control.card[i].uuid, uuid) == 0)
            return &control.card[i];
    return NULL;
}

/* Handles */

static nvmlDevice_t handle_of(const struct card *card)
{
    int i;
    for (i = 0; i < handles; i++)
        if (handle[i].session == session && handle[i].epoch == card->epoch &&
            strcmp(handle[i].uuid, card->uuid) == 0)
            return &handle[i];
    if (handles == MAX_HANDLES)
        fail("too many handles");
    copy(handle[handles].uuid, sizeof handle[handles].uuid, card->uuid);
    handle[handles].epoch = card->epoch;
    handle[handles].session = session;
    return &handle[handles++];
}

static nvmlReturn_t judge(nvmlDevice_t device, struct card *card)
{
    struct card *found;

    if (references == 0)
        return UNINITIALIZED;
    if (device == NULL || device->session != session)
        return INVALID_ARGUMENT;
    found = find_card(device->uuid);
    if (found == NULL || found->lost > 0 || found->epoch != device->epoch)
        return GPU_IS_LOST;
    *card = *found;
    return SUCCESS;
}

/* Whether the card's hang and error are of this call. */
static bool concerned(const struct card *card, const char *call)
{
    return card->call[0] == '\0' || strcmp(card->call, "-") == 0 || strcmp(card->call, call) == 0;
}

/* The card of a handle as it is now, after its hang; what every call on a card begins with. */
static nvmlReturn_t enter_call(nvmlDevice_t device, struct card *card, const char *call)
{
    double start = now_ms();
    memset(card, 0, sizeof *card);
    for (;;) {
        nvmlReturn_t result;
        pthread_mutex_lock(&mutex);
        refresh();
        result = judge(device, card);
        pthread_mutex_unlock(&mutex);
        if (result != SUCCESS)
            return result;
        if (!concerned(card, call))
            return SUCCESS;
        if (now_ms() - start >= card->hang * 1e3)
            return (nvmlReturn_t)card->call_error;
        sleep_ms(2);
    }
}

#define enter(device, card) enter_call(device, card, __func__ + strlen("nvml"))

/* The same, into variables of the call. */
#define ENTER(device) \
    struct card card; \
    nvmlReturn_t result = enter(device, &card)

static nvmlReturn_t take_handle(const char *uuid, nvmlDevice_t *device, const char *call)
{
    struct card *card = find_card(uuid), ignored;

    if (card == NULL || card->lost > 0 || card->handle_error > 0) {
        nvmlReturn_t result = card == NULL || card->lost > 0 ? GPU_IS_LOST : card->handle_error;
        pthread_mutex_unlock(&mutex);
        return result;
    }
    *device = handle_of(card);
    pthread_mutex_unlock(&mutex);
    return enter_call(*device, &ignored, call);
}

static nvmlReturn_t text(char *to, unsigned int length, const char *from)
{
    if (strlen(from) >= length)
        return INSUFFICIENT_SIZE;
    copy(to, length, from);
    return SUCCESS;
}

/* Library and system */

/* Takes the mutex, once the file does not say that this call hangs. */
static void lock_system(const char *call)
{
    for (;;) {
        pthread_mutex_lock(&mutex);
        if (!refresh() || strcmp(control.system_hang, call) != 0)
            return;
        pthread_mutex_unlock(&mutex);
        sleep_ms(2);
    }
}
#define LOCK_SYSTEM() lock_system(__func__ + strlen("nvml"))

nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    nvmlReturn_t result = SUCCESS;
    int i;

    (void)flags;
    LOCK_SYSTEM();
    if (!refresh())
        result = DRIVER_NOT_LOADED;
    else if (control.init_error != 0)
        result = control.init_error;
    else if (references++ == 0) {
        session++;
        enumerated = control.cards;
        for (i = 0; i < enumerated; i++)
            copy(enumerated_uuid[i], sizeof enumerated_uuid[i], control.card[i].uuid);
        for (i = 0; !past_is_known && i < control.events; i++)
            delivered[control.event[i].number] = true;
        past_is_known = true;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

nvmlReturn_t nvmlShutdown(void)
{
    nvmlReturn_t result = SUCCESS;

    LOCK_SYSTEM();
    if (references == 0)
        result = UNINITIALIZED;
    else if (--references == 0 && waiters > 0)
        fail("shutdown while a thread waits for events");
    pthread_mutex_unlock(&mutex);
    return result;
}

const char *nvmlErrorString(nvmlReturn_t result)
{
    switch (result) {
    case SUCCESS:
        return "The operation was successful";
    case GPU_IS_LOST:
        return "GPU is lost";
    default:
        return "Fake Error";
    }
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    nvmlReturn_t result = UNINITIALIZED;

    LOCK_SYSTEM();
    if (references > 0) {
        refresh();
        *version = atoi(control.driver) >= LIMITS_DRIVER ? 13040
                   : atoi(control.driver) >= 590         ? 13010
                                                         : 13000;
        result = SUCCESS;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    nvmlReturn_t result = UNINITIALIZED;

    LOCK_SYSTEM();
    if (references > 0) {
        refresh();
        result = text(version, length, control.driver);
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

/* Cards */

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count)
{
    nvmlReturn_t result = SUCCESS;

    LOCK_SYSTEM();
    if (references == 0)
        result = UNINITIALIZED;
    *count = (unsigned int)enumerated;
    pthread_mutex_unlock(&mutex);
    return result;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device)
{
    pthread_mutex_lock(&mutex);
    refresh();
    if (references == 0 || index >= (unsigned int)enumerated) {
        nvmlReturn_t result = references == 0 ? UNINITIALIZED : INVALID_ARGUMENT;
        pthread_mutex_unlock(&mutex);
        return result;
    }
    return take_handle(enumerated_uuid[index], device, "DeviceGetHandleByIndex_v2");
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    int i;

    pthread_mutex_lock(&mutex);
    refresh();
    for (i = 0; references > 0 && i < enumerated; i++)
        if (strcmp(enumerated_uuid[i], uuid) == 0)
            return take_handle(enumerated_uuid[i], device, "DeviceGetHandleByUUID");
    i = references;
    pthread_mutex_unlock(&mutex);
    return i == 0 ? UNINITIALIZED : NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length)
{
    ENTER(device);
    return result != SUCCESS ? result : text(uuid, length, card.uuid);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length)
{
    ENTER(device);
    return result != SUCCESS ? result : text(name, length, card.name);
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    ENTER(device);
    if (result != SUCCESS)
        return result;
    memset(pci, 0, sizeof *pci);
    if (sscanf(card.bus, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device) != 3)
        fail("not a bus ID: %s", card.bus);
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "%04X:%02X:%02X.0", pci->domain & 0xFFFF,
             pci->bus & 0xFF, pci->device & 0xFF);
    copy(pci->busId, sizeof pci->busId, card.bus);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    ENTER(device);
    if (result != SUCCESS || card.error != 0)
        return result != SUCCESS ? result : (nvmlReturn_t)card.error;
    /* The first version counts what the driver reserves as used. */
    memory->total = (unsigned long long)card.memory << 20;
    memory->used = (unsigned long long)(card.used + card.reserved) << 20;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    ENTER(device);
    if (result != SUCCESS)
        return result;
    if (card.memory_v2 == 0)
        return FUNCTION_NOT_FOUND;
    if (card.error != 0)
        return (nvmlReturn_t)card.error;
    if (memory->version != MEMORY_V2)
        return VERSION_MISMATCH;
    memory->total = (unsigned long long)card.memory << 20;
    memory->reserved = (unsigned long long)card.reserved << 20;
    memory->used = (unsigned long long)card.used << 20;
    memory->free = memory->total - memory->reserved - memory->used;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    ENTER(device);
    *major = card.major;
    *minor = card.minor;
    return result;
}

/* A value that the card may not offer. */
static nvmlReturn_t offered(nvmlReturn_t result, long long value, unsigned int *to)
{
    if (result == SUCCESS && value == NONE)
        result = NOT_SUPPORTED;
    if (result == SUCCESS)
        *to = (unsigned int)value;
    return result;
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending)
{
    ENTER(device);
    result = offered(result, card.mig, current);
    return offered(result, card.mig, pending);
}

/* The mode that was set last, else that of the control file. */
static long long compute_mode_of(const struct card *card)
{
    const char *path = getenv("FAKE_NVML_LOG");
    FILE *file = path == NULL ? NULL : fopen(path, "re");
    long long mode = card->compute_mode, found;
    char *line = NULL, uuid[96];
    size_t size = 0;

    if (file == NULL)
        return mode;
    while (getline(&line, &size, file) > 0)
        if (sscanf(line, "compute_mode %95s %lld", uuid, &found) == 2 &&
            strcmp(uuid, card->uuid) == 0)
            mode = found;
    free(line);
    fclose(file);
    return mode;
}

nvmlReturn_t nvmlDeviceGetComputeMode(nvmlDevice_t device, unsigned int *mode)
{
    ENTER(device);
    return offered(result, compute_mode_of(&card), mode);
}

nvmlReturn_t nvmlDeviceSetComputeMode(nvmlDevice_t device, unsigned int mode)
{
    struct card card;
    const char *path = getenv("FAKE_NVML_LOG");
    FILE *file;
    nvmlReturn_t result = enter(device, &card);

    if (result != SUCCESS || card.set_mode_error != 0)
        return result != SUCCESS ? result : (nvmlReturn_t)card.set_mode_error;
    file = path == NULL ? NULL : fopen(path, "ae");
    if (file == NULL)
        fail("FAKE_NVML_LOG cannot be written");
    fprintf(file, "compute_mode %s %u\n", card.uuid, mode);
    fclose(file);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *energy)
{
    unsigned int value = 0;
    ENTER(device);
    result = offered(result, card.energy, &value);
    *energy = value;
    return result;
}

nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned int kind,
                                         unsigned int counter, unsigned long long *count)
{
    unsigned int value = 0;
    ENTER(device);
    (void)counter;
    result = offered(result, card.ecc, &value);
    *count = kind == UNCORRECTED ? value : 0;
    return result;
}

nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned int *correctable,
                                       unsigned int *uncorrectable, unsigned int *pending,
                                       unsigned int *failed)
{
    ENTER(device);
    *correctable = *uncorrectable = 0;
    result = offered(result, card.remap_pending, pending);
    return offered(result, card.remap_failed, failed);
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t *values)
{
    ENTER(device);
    int i;
    for (i = 0; result == SUCCESS && i < count; i++) {
        long long value = values[i].fieldId == FIELD_RECOVERY_ACTION ? card.action : NONE;
        values[i].valueType = VALUE_UNSIGNED_INT;
        values[i].nvmlReturn = offered(SUCCESS, value, &values[i].value.uiVal);
    }
    return result;
}

/* Processes */

/* As every call on a card begins, after the time that its lists take as well. */
static nvmlReturn_t enter_lists(nvmlDevice_t device, struct card *card)
{
    double start = now_ms();
    for (;;) {
        nvmlReturn_t result = enter(device, card);
        if (result != SUCCESS || now_ms() - start >= card->list_hang * 1e3)
            return result;
        sleep_ms(2);
    }
}

/* How many there are is asked for by room for none. */
static nvmlReturn_t list(const struct processes *from, long long error, unsigned int *count,
                         nvmlProcessInfo_t *to)
{
    unsigned int room = *count, i;

    if (error != 0)
        return (nvmlReturn_t)error;
    if (from->count == NONE)
        return NOT_SUPPORTED;
    *count = (unsigned int)from->count;
    if (*count > room)
        return INSUFFICIENT_SIZE;
    for (i = 0; i < *count; i++) {
        const struct process *process = &from->process[i];
        memset(&to[i], 0, sizeof to[i]);
        to[i].pid = (unsigned int)process->pid;
        to[i].usedGpuMemory = process->memory == NONE ? NOT_AVAILABLE
                                                      : (unsigned long long)process->memory << 20;
        to[i].gpuInstanceId = to[i].computeInstanceId = 0xFFFFFFFF;
    }
    return SUCCESS;
}

#define PROCESSES(name, field) \
    nvmlReturn_t name##_v2(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *processes) \
    { \
        struct card card; \
        nvmlReturn_t result = enter_lists(device, &card); \
        return result != SUCCESS ? result \
                                 : list(&card.field, card.field##_error, count, processes); \
    } \
    nvmlReturn_t name##_v3(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *processes) \
    { \
        ENTER(device); \
        if (result == SUCCESS && card.process_v3 == 0) \
            return FUNCTION_NOT_FOUND; \
        return name##_v2(device, count, processes); \
    }

PROCESSES(nvmlDeviceGetComputeRunningProcesses, compute)
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses, mps)

/* Memory limits */

#ifndef NO_MEMORY_LIMITS

#define NO_LIMIT (~0ULL)

typedef struct {
    const char *nameSpace;
    unsigned long long softLimit, hardLimit;
} nvmlSetMemoryLimits_v1_t;

typedef struct {
    const char *nameSpace;
    unsigned long long softLimit, hardLimit, currentUsed;
} nvmlGetMemoryLimits_v1_t;

struct limited {
    char uuid[96], *path;
    unsigned long long soft, hard, used;
};

/* What the file of limits said when it was read last, and how far that was. Guarded by `mutex`. */
static struct limited *limited;
static size_t limiteds;
static long limits_end;

static struct limited *limited_at(const char *uuid, const char *path, size_t length)
{
    size_t i;

    for (i = 0; i < limiteds; i++)
        if (strcmp(limited[i].uuid, uuid) == 0 && strncmp(limited[i].path, path, length) == 0 &&
            limited[i].path[length] == '\0')
            return &limited[i];
    return NULL;
}

static struct limited *add_limited(const char *uuid, const char *path)
{
    struct limited *grown = realloc(limited, (limiteds + 1) * sizeof *limited), *added;

    if (grown == NULL)
        fail("no memory");
    limited = grown;
    added = &limited[limiteds++];
    memset(added, 0, sizeof *added);
    copy(added->uuid, sizeof added->uuid, uuid);
    added->hard = NO_LIMIT;
    added->path = strdup(path);
    if (added->path == NULL)
        fail("no memory");
    return added;
}

static void read_limits(void)
{
    const char *name = getenv("FAKE_NVML_LIMITS");
    FILE *file = name == NULL ? NULL : fopen(name, "re");
    char kind[8], uuid[96], path[PATH_MAX];
    unsigned long long first, second;
    struct stat found;
    size_t length;

    if (file == NULL)
        return;
    if (fstat(fileno(file), &found) == 0 && found.st_size > limits_end) {
        flock(fileno(file), LOCK_SH);
        fseek(file, limits_end, SEEK_SET);
        while (fscanf(file, "%7s %95s %llu %llu %zu", kind, uuid, &first, &second, &length) == 5) {
            struct limited *one;
            if (length >= sizeof path || fgetc(file) != '\n' ||
                fread(path, 1, length, file) != length || fgetc(file) != '\n')
                fail("not a file of memory limits: %s", name);
            path[length] = '\0';
            one = limited_at(uuid, path, length);
            if (one == NULL)
                one = add_limited(uuid, path);
            if (strcmp(kind, "used") == 0)
                one->used = first;
            else {
                one->soft = first;
                one->hard = second;
            }
            limits_end = ftell(file);
        }
    }
    fclose(file);
}

static void append_limit(const char *uuid, const nvmlSetMemoryLimits_v1_t *limits, const char *path)
{
    const char *name = getenv("FAKE_NVML_LIMITS");
    int file = name == NULL ? -1 : open(name, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    char record[PATH_MAX + 256];
    int length = snprintf(record, sizeof record, "limit %s %llu %llu %zu\n%s\n", uuid,
                          limits->softLimit, limits->hardLimit, strlen(path), path);

    if (file < 0 || flock(file, LOCK_EX) != 0 || write(file, record, (size_t)length) != length)
        fail("FAKE_NVML_LIMITS cannot be written: %s", strerror(errno));
    close(file);
}

/* The directory as the kernel knows it. */
static nvmlReturn_t resolve(const char *path, char *resolved)
{
    struct stat found;

    if (path == NULL || path[0] != '/')
        return INVALID_ARGUMENT;
    if (realpath(path, resolved) == NULL || stat(resolved, &found) != 0)
        return errno == ENOENT   ? NOT_FOUND
               : errno == EACCES ? NO_PERMISSION
                                 : INVALID_ARGUMENT;
    return S_ISDIR(found.st_mode) ? SUCCESS : INVALID_ARGUMENT;
}

static bool has_dmem(const char *path, size_t length)
{
    char name[PATH_MAX + 16];

    snprintf(name, sizeof name, "%.*s/dmem.max", (int)length, path);
    return access(name, F_OK) == 0;
}

/* The length of the part of a path that names its parent; 0 for the root. */
static size_t parent(const char *path, size_t length)
{
    while (length > 0 && path[--length] != '/')
        ;
    return length;
}

/* As every call on memory limits begins. Returns with the mutex held. */
static nvmlReturn_t enter_limits(nvmlDevice_t device, struct card *card, const char *path,
                                 char *resolved, const char *call)
{
    nvmlReturn_t result = enter_call(device, card, call);

    pthread_mutex_lock(&mutex);
    if (result != SUCCESS)
        return result;
    if (atoi(control.driver) < LIMITS_DRIVER)
        return FUNCTION_NOT_FOUND;
    if (card->limits_error != 0)
        return (nvmlReturn_t)card->limits_error;
    return card->mig == 1 ? NOT_SUPPORTED : resolve(path, resolved);
}

#define ENTER_LIMITS(device, limits) \
    struct card card; \
    char path[PATH_MAX]; \
    nvmlReturn_t result = \
        enter_limits(device, &card, (limits)->nameSpace, path, __func__ + strlen("nvml"))

nvmlReturn_t nvmlDeviceGetMemoryLimits_v1(nvmlDevice_t device, nvmlGetMemoryLimits_v1_t *limits)
{
    ENTER_LIMITS(device, limits);
    if (result == SUCCESS) {
        const struct limited *one = NULL, *own;
        size_t length = strlen(path);
        read_limits();
        if (control.dmem) {
            while (length > 0 && !has_dmem(path, length))
                length = parent(path, length);
            own = one = limited_at(card.uuid, path, length);
        } else {
            own = limited_at(card.uuid, path, length);
            for (; length > 0; length = parent(path, length)) {
                one = limited_at(card.uuid, path, length);
                if (one != NULL && (one->hard != NO_LIMIT || one->soft != 0))
                    break;
                one = NULL;
            }
        }
        limits->softLimit = one == NULL ? 0 : one->soft;
        limits->hardLimit = one == NULL ? NO_LIMIT : one->hard;
        limits->currentUsed = own == NULL ? 0 : own->used;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

nvmlReturn_t nvmlDeviceSetMemoryLimits_v1(nvmlDevice_t device, nvmlSetMemoryLimits_v1_t *limits)
{
    ENTER_LIMITS(device, limits);
    if (result == SUCCESS) {
        if (getenv("FAKE_NVML_UNPRIVILEGED") != NULL)
            result = NO_PERMISSION;
        else if (card.set_limits_error != 0)
            result = (nvmlReturn_t)card.set_limits_error;
        else if (limits->softLimit > limits->hardLimit)
            result = INVALID_ARGUMENT;
        else if (control.dmem && !has_dmem(path, strlen(path)))
            result = NOT_FOUND;
        else
            append_limit(card.uuid, limits, path);
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

#endif

/* Events */

nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *types)
{
    ENTER(device);
    unsigned int value = 0;
    result = offered(result, card.events, &value);
    *types = value;
    return result;
}

nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    *set = calloc(1, sizeof **set);
    return *set == NULL ? UNINITIALIZED : SUCCESS;
}

nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set)
{
    free(set);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types,
                                      nvmlEventSet_t set)
{
    ENTER(device);
    if (result != SUCCESS)
        return result;
    if (card.events == NONE || (types & ~(unsigned long long)card.events) != 0)
        return NOT_SUPPORTED;
    if (set->count == MAX_CARDS)
        fail("too many cards in an event set");
    pthread_mutex_lock(&mutex);
    set->device[set->count] = device;
    set->types[set->count++] = types;
    pthread_mutex_unlock(&mutex);
    return SUCCESS;
}

/* The next event for the cards of the set. */
static bool next_event(nvmlEventSet_t set, nvmlEventData_t *data)
{
    int i, j;
    for (i = 0; i < control.events; i++) {
        const struct event *event = &control.event[i];
        bool unknown = strcmp(event->uuid, "-") == 0;
        if (delivered[event->number])
            continue;
        for (j = 0; j < set->count; j++)
            if ((set->types[j] & (unsigned long long)event->type) != 0 &&
                (unknown || strcmp(set->device[j]->uuid, event->uuid) == 0)) {
                delivered[event->number] = true;
                memset(data, 0, sizeof *data);
                data->device = unknown ? NULL : set->device[j];
                data->eventType = (unsigned long long)event->type;
                data->eventData = (unsigned long long)event->xid;
                data->gpuInstanceId = data->computeInstanceId = 0xFFFFFFFF;
                return true;
            }
    }
    return false;
}

/* Waits for another control file, as a thread that waits for a real driver is woken by it. */
static void wait_for_news(double milliseconds)
{
    static int news = -1;
    const char *control = getenv("FAKE_NVML_CONTROL");
    struct pollfd asked;
    char names[4096], path[PATH_MAX];

    if (news < 0) {
        news = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
        if (news < 0 || control == NULL) {
            sleep_ms(1);
            return;
        }
        copy(path, sizeof path, control);
        inotify_add_watch(news, dirname(path), IN_MOVED_TO);
        return; /* what came before this is looked for first */
    }
    asked = (struct pollfd){.fd = news, .events = POLLIN};
    poll(&asked, 1, (int)ceil(fmax(milliseconds, 0)));
    while (read(news, names, sizeof names) > 0)
        ;
}

nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *data, unsigned int timeout)
{
    double end = now_ms() + timeout;
    nvmlReturn_t result = TIMEOUT;
    bool over = false;

    LOCK_SYSTEM();
    waiters++;
    while (!over) {
        over = now_ms() >= end;
        refresh();
        if (references == 0)
            result = UNINITIALIZED;
        else if (control.wait_error != 0)
            result = control.wait_error;
        else if (next_event(set, data))
            result = SUCCESS;
        if (result != TIMEOUT)
            break;
        if (!over) {
            pthread_mutex_unlock(&mutex);
            wait_for_news(end - now_ms());
            pthread_mutex_lock(&mutex);
        }
    }
    waiters--;
    pthread_mutex_unlock(&mutex);
    return result;
}
