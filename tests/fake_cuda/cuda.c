/*
 * A libcuda.so.1 for tests: no GPU, no driver; what the clients of tests/on_gpu call, and no more.
 *
 * Where a daemon listens in CUDA_MPS_PIPE_DIRECTORY/control (see control.py) the process becomes its
 * client by a connection that it keeps; otherwise it runs without MPS. A client wants that directory
 * and /dev/shm to be writable, so that a test sees which mounts there are. FAKE_CUDA_MEMORY is the GPU's
 * memory in MiB, of which a context takes CONTEXT. Limits of the environment are kept for well-formed
 * values of ordinal 0, of the daemon not at all. A limit that the fake NVML has for the process's
 * cgroup holds, and is what is shown as the total unless MPS limits too; what is in use is said to that
 * NVML. Of the bodies that attract each other only the first few move. What real drivers do where a daemon, a server or a neighbour dies is not known here: the
 * errors are some.
 */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    ILLEGAL_ADDRESS = 700,
    MPS_CONNECTION_FAILED = 805,
    MPS_RPC_FAILURE = 806,
    MPS_MAX_CLIENTS_REACHED = 808,
};
enum { MULTIPROCESSORS = 16, MPS_ENABLED = 133, STEP = 1, POKE = 2, MOVED = 2 };

static const size_t MIB = 1 << 20, CONTEXT = 300;

typedef unsigned long long pointer;
static struct { pointer at; size_t size; } taken[4096];
static int count, connection = -1, illegal;

static size_t env(const char *name, size_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoul(text, NULL, 10) : otherwise;
}

static size_t whole(void) { return env("FAKE_CUDA_MEMORY", 81559) * MIB; }

/* The path of the process's cgroup, v2, as a file of tests/fake_nvml has it; its length. */
static int cgroup(char *path, size_t size)
{
    char line[512];
    FILE *file = fopen("/proc/self/cgroup", "r");
    int length = 0;
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, "0::/", 4) == 0)
            length = snprintf(path, size, "/sys/fs/cgroup%.*s", (int)strcspn(line + 3, "\n"), line + 3);
    if (file) fclose(file);
    return length;
}

/* What the driver lets the cgroup have: the limit of the nearest one above that has any. */
static size_t by_driver(void)
{
    char own[600], path[4096];
    unsigned long long hard, nearest = ~0ull;
    size_t length, longest = 0;
    const char *name = getenv("FAKE_NVML_LIMITS");
    FILE *file = name ? fopen(name, "r") : NULL;
    char kind[8];
    cgroup(own, sizeof own);
    while (file && fscanf(file, "%7s %*s %*u %llu %zu%*c", kind, &hard, &length) == 3) {
        if (length >= sizeof path || fread(path, 1, length, file) != length) break;
        if (strcmp(kind, "limit") != 0 || strncmp(own, path, length) != 0 || length < longest) continue;
        if (own[length] != '/' && own[length] != '\0') continue;
        if (hard == ~0ull && length > longest) continue;
        nearest = hard;
        longest = length;
    }
    if (file) fclose(file);
    return nearest < whole() ? (size_t)nearest : whole();
}

static size_t by_mps(void)
{
    const char *text = getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT");
    size_t value;
    char unit;
    if (connection < 0 || !text || sscanf(text, "0=%zu%c", &value, &unit) != 2) return whole();
    if (value == 0 || (unit != 'M' && unit != 'G')) return whole();
    value *= unit == 'G' ? 1024 * MIB : MIB;
    return value < whole() ? value : whole();
}

static size_t total(void) { return by_mps() < whole() ? whole() : by_driver(); }
static size_t limit(void) { return by_mps() < by_driver() ? by_mps() : by_driver(); }

static size_t used(void)
{
    size_t sum = CONTEXT * MIB;
    for (int n = 0; n < count; n++) sum += taken[n].size;
    return sum;
}

static void say_used(size_t bytes)
{
    char path[600];
    const char *name = getenv("FAKE_NVML_LIMITS"), *gpu = getenv("NVIDIA_VISIBLE_DEVICES");
    int length = cgroup(path, sizeof path);
    FILE *file = name && gpu && length > 0 ? fopen(name, "a") : NULL;
    if (!file) return;
    fprintf(file, "used %s %zu 0 %d\n%s\n", gpu, bytes, length, path);
    fclose(file);
}

static int lost(void)
{
    char byte;
    if (illegal) return ILLEGAL_ADDRESS;
    if (connection < 0) return SUCCESS;
    return recv(connection, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0 ? MPS_RPC_FAILURE : SUCCESS;
}

int cuInit(unsigned int flags)
{
    const char *directory = getenv("CUDA_MPS_PIPE_DIRECTORY");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct statvfs pipe, shm;
    char answer[16] = "";
    (void)flags;
    snprintf(address.sun_path, sizeof address.sun_path, "%.90s/control", directory ? directory : "");
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!directory || connect(connection, (struct sockaddr *)&address, sizeof address) != 0) {
        close(connection);
        connection = -1;
        return SUCCESS;
    }
    if (statvfs(directory, &pipe) || statvfs("/dev/shm", &shm)) return MPS_CONNECTION_FAILED;
    if ((pipe.f_flag | shm.f_flag) & ST_RDONLY) return MPS_CONNECTION_FAILED;
    if (write(connection, "CLIENT\n", 7) != 7 || read(connection, answer, sizeof answer - 1) <= 0)
        return MPS_CONNECTION_FAILED;
    return strcmp(answer, "full\n") == 0 ? MPS_MAX_CLIENTS_REACHED : SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device)
{
    *context = &count;
    say_used(used());
    return device;
}
int cuCtxSetCurrent(void *context) { (void)context; return SUCCESS; }
int cuCtxSynchronize(void) { usleep(200); return lost(); }

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    size_t percent = connection < 0 ? 100 : env("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", 100);
    if (attribute != MULTIPROCESSORS && attribute != MPS_ENABLED) return INVALID_VALUE;
    *value = attribute == MPS_ENABLED ? connection >= 0 : (int)(132 * percent / 100);
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *all)
{
    *all = total();
    *free_bytes = limit() > used() ? limit() - used() : 0;
    return lost();
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = total(); return SUCCESS; }

/* Small pieces are memory of this process, large ones only a number. */
int cuMemAlloc_v2(pointer *at, size_t size)
{
    static pointer next = 1ull << 48;
    int code = lost();
    if (code) return code;
    if (used() + size > limit() || count == 4096) return OUT_OF_MEMORY;
    if (size <= 4 * MIB) *at = (pointer)(size_t)calloc(1, size);
    else *at = next += 1ull << 40;
    taken[count].at = *at;
    taken[count++].size = size;
    say_used(used());
    return SUCCESS;
}

int cuMemFree_v2(pointer at)
{
    for (int n = 0; n < count; n++)
        if (taken[n].at == at) {
            if (taken[n].size <= 4 * MIB) free((void *)(size_t)at);
            taken[n] = taken[--count];
            say_used(used());
            return lost();
        }
    return INVALID_VALUE;
}

int cuMemsetD8_v2(pointer at, unsigned char byte, size_t size)
{
    memset((void *)(size_t)at, byte, size);
    return lost();
}

int cuMemcpyHtoD_v2(pointer at, const void *from, size_t size)
{
    memcpy((void *)(size_t)at, from, size);
    return lost();
}

int cuMemcpyDtoH_v2(void *to, pointer at, size_t size)
{
    memcpy(to, (void *)(size_t)at, size);
    return lost();
}

int cuModuleLoad(void **module, const char *path) { *module = &count; return access(path, R_OK); }

int cuModuleGetFunction(void **function, void *module, const char *name)
{
    (void)module;
    *function = (void *)(size_t)(strcmp(name, "poke") == 0 ? POKE : STEP);
    return SUCCESS;
}

static void move(const float *from, float *to, float *velocity, int bodies, float step)
{
    memcpy(to, from, 16 * (size_t)bodies);
    for (int me = 0; me < MOVED; me++) {
        double pull[3] = {0, 0, 0};
        for (int other = 0; other < bodies; other++) {
            double away[3], squares = 0.01;
            for (int axis = 0; axis < 3; axis++) {
                away[axis] = from[4 * other + axis] - from[4 * me + axis];
                squares += away[axis] * away[axis];
            }
            for (int axis = 0; axis < 3; axis++)
                pull[axis] += away[axis] * from[4 * other + 3] / (squares * sqrt(squares));
        }
        for (int axis = 0; axis < 3; axis++) {
            velocity[4 * me + axis] += (float)(pull[axis] * step);
            to[4 * me + axis] += velocity[4 * me + axis] * step;
        }
    }
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **values, void **extra)
{
    int code = lost();
    (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz;
    (void)shared, (void)stream, (void)extra;
    if (code) return code;
    if ((size_t)function == POKE) {
        illegal = 1;
        if (connection >= 0 && write(connection, "FAULT\n", 6) != 6) return MPS_RPC_FAILURE;
        return SUCCESS;
    }
    move(*(float **)values[0], *(float **)values[1], *(float **)values[2], *(int *)values[3],
         *(float *)values[4]);
    return SUCCESS;
}

int cuGetErrorName(int code, const char **name)
{
    switch (code) {
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
    case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return SUCCESS;
    case MPS_CONNECTION_FAILED: *name = "CUDA_ERROR_MPS_CONNECTION_FAILED"; return SUCCESS;
    case MPS_RPC_FAILURE: *name = "CUDA_ERROR_MPS_RPC_FAILURE"; return SUCCESS;
    case MPS_MAX_CLIENTS_REACHED: *name = "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED"; return SUCCESS;
    default: *name = "CUDA_ERROR_UNKNOWN"; return INVALID_VALUE;
    }
}
