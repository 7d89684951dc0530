/* Stands in for libcuda.so.1 in tests: "GPU memory" is host memory named by fake_register().
 *
 * Has the driver functions that kvikio looks up, so that the real kvikio runs its host path and its
 * bounce-buffer path on a machine without a GPU. Nothing of it is asynchronous.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef uint64_t Address;

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, RUNS_MAX = 4096 };
enum { ATTRIBUTE_CONTEXT = 1, ATTRIBUTE_MEMORY_TYPE = 2, ATTRIBUTE_POINTER = 3, ATTRIBUTE_ORDINAL = 9 };
enum { MEMORY_TYPE_DEVICE = 2 };

static struct { Address begin; size_t length; } runs[RUNS_MAX];
static int run_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long copied_bytes; /* from host to "GPU" memory */

static void *const CONTEXT = (void *)0x1000;
static void *const STREAM = (void *)0x2000;
static void *const EVENT = (void *)0x3000;

void fake_register(Address begin, size_t length)
{
    pthread_mutex_lock(&lock);
    if (run_count == RUNS_MAX)
        abort();
    runs[run_count].begin = begin;
    runs[run_count].length = length;
    run_count++;
    pthread_mutex_unlock(&lock);
}

long fake_copied_bytes(void) { return __sync_fetch_and_add(&copied_bytes, 0); }

static int find(Address at)
{
    for (int i = run_count - 1; i >= 0; i--)
        if (at >= runs[i].begin && at < runs[i].begin + runs[i].length)
            return i;
    return -1;
}

static Result copy(Address to, Address from, size_t length)
{
    memcpy((void *)to, (const void *)from, length);
    if (find(to) >= 0)
        __sync_fetch_and_add(&copied_bytes, (long)length);
    return SUCCESS;
}

Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }

Result cuPointerGetAttribute(void *data, int attribute, Address at)
{
    if (find(at) < 0)
        return INVALID_VALUE;
    switch (attribute) {
    case ATTRIBUTE_CONTEXT: *(void **)data = CONTEXT; return SUCCESS;
    case ATTRIBUTE_MEMORY_TYPE: *(unsigned *)data = MEMORY_TYPE_DEVICE; return SUCCESS;
    case ATTRIBUTE_POINTER: *(Address *)data = at; return SUCCESS;
    case ATTRIBUTE_ORDINAL: *(int *)data = 0; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

Result cuPointerGetAttributes(unsigned count, int *attributes, void **data, Address at)
{
    int known = find(at) >= 0;
    for (unsigned i = 0; i < count; i++) {
        if (attributes[i] == ATTRIBUTE_MEMORY_TYPE)
            *(unsigned *)data[i] = known ? MEMORY_TYPE_DEVICE : 0;
        else if (attributes[i] == ATTRIBUTE_ORDINAL)
            *(int *)data[i] = 0;
        else if (attributes[i] == ATTRIBUTE_CONTEXT)
            *(void **)data[i] = known ? CONTEXT : NULL;
    }
    return SUCCESS;
}

Result cuMemGetAddressRange_v2(Address *begin, size_t *length, Address at)
{
    int i = find(at);
    if (i < 0)
        return INVALID_VALUE;
    if (begin)
        *begin = runs[i].begin;
    if (length)
        *length = runs[i].length;
    return SUCCESS;
}

Result cuMemHostAlloc(void **memory, size_t length, unsigned flags)
{
    return posix_memalign(memory, 4096, length) ? OUT_OF_MEMORY : SUCCESS;
}
Result cuMemFreeHost(void *memory) { free(memory); return SUCCESS; }
Result cuMemHostRegister_v2(void *memory, size_t length, unsigned flags) { return SUCCESS; }
Result cuMemHostUnregister(void *memory) { return SUCCESS; }

Result cuMemcpyHtoDAsync_v2(Address to, void *from, size_t length, void *stream)
{
    return copy(to, (Address)from, length);
}
Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t length, void *stream)
{
    return copy((Address)to, from, length);
}
Result cuMemcpyAsync(Address to, Address from, size_t length, void *stream)
{
    return copy(to, from, length);
}
Result cuMemcpyBatchAsync_v2(Address *to, Address *from, size_t *lengths, size_t count,
                             void *attributes, size_t *indices, size_t attribute_count, void *stream)
{
    for (size_t i = 0; i < count; i++)
        copy(to[i], from[i], lengths[i]);
    return SUCCESS;
}
Result cuMemcpyBatchAsync(Address *to, Address *from, size_t *lengths, size_t count,
                          void *attributes, size_t *indices, size_t attribute_count, size_t *failed,
                          void *stream)
{
    return cuMemcpyBatchAsync_v2(to, from, lengths, count, attributes, indices, attribute_count, stream);
}

Result cuCtxCreate_v2(void **context, unsigned flags, int device) { *context = CONTEXT; return SUCCESS; }
Result cuCtxCreate_v4(void **context, void *parameters, unsigned flags, int device)
{
    *context = CONTEXT;
    return SUCCESS;
}
Result cuCtxDestroy_v2(void *context) { return SUCCESS; }
Result cuCtxPushCurrent_v2(void *context) { return SUCCESS; }
Result cuCtxPopCurrent_v2(void **context)
{
    if (context)
        *context = CONTEXT;
    return SUCCESS;
}
Result cuCtxGetCurrent(void **context) { *context = CONTEXT; return SUCCESS; }
Result cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }

Result cuGetErrorName(Result error, const char **name) { *name = "CUDA_FAKE"; return SUCCESS; }
Result cuGetErrorString(Result error, const char **text) { *text = "fake error"; return SUCCESS; }

Result cuDeviceGet(int *device, int ordinal) { *device = 0; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return SUCCESS; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }

Result cuStreamSynchronize(void *stream) { return SUCCESS; }
Result cuStreamCreate(void **stream, unsigned flags) { *stream = STREAM; return SUCCESS; }
Result cuStreamDestroy_v2(void *stream) { return SUCCESS; }
Result cuEventCreate(void **event, unsigned flags) { *event = EVENT; return SUCCESS; }
Result cuEventDestroy_v2(void *event) { return SUCCESS; }
Result cuEventRecord(void *event, void *stream) { return SUCCESS; }
Result cuEventQuery(void *event) { return SUCCESS; }
Result cuEventSynchronize(void *event) { return SUCCESS; }
Result cuLaunchHostFunc(void *stream, void (*call)(void *), void *data) { call(data); return SUCCESS; }
