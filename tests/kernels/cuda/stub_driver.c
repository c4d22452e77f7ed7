/* libcuda.so.1 without a card, for `test_bindings.py`: functions that the CUDA backend asks for answer plausibly, all
   others say that they are done. What reaches the driver is written to stderr, a line a call. Memory is the computer's;
   kernels do not run. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TELL(...) return fprintf(stderr, __VA_ARGS__), 0
typedef void *handle;

static handle current;

static int done(void) { return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 2, 0; }
int cuDeviceGetName(char *name, int length, int device) { return strncpy(name, "A stub", length), 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 232448 : 1, 0;
}
static int device_get(int *device, int ordinal) { return *device = ordinal, 0; }
static int retain(handle *context, int device) { return *context = (handle)(uintptr_t)(0x1000 + device), 0; }
static int get_current(handle *context) { return *context = current, 0; }
static int set_current(handle context) { return current = context, 0; }
static int allocate(uint64_t *address, size_t size, handle stream) {
    *address = (uint64_t)aligned_alloc(256, (size + 255) / 256 * 256);
    TELL("allocate %zu on %p\n", size, stream);
}
static int release(uint64_t address, handle stream) {
    free((void *)address);
    TELL("free on %p\n", stream);
}
static int copy_in(uint64_t target, const void *source, size_t size, handle stream) {
    memcpy((void *)target, source, size);
    TELL("copy in %zu on %p\n", size, stream);
}
static int copy_out(void *target, uint64_t source, size_t size, handle stream) {
    memset(target, 0, size);
    TELL("copy out %zu on %p\n", size, stream);
}
static int synchronize(handle stream) { TELL("synchronize %p\n", stream); }
static int is_capturing(handle stream, int *status) { return *status = stream == (handle)99, 0; }
static int load(handle *library, const char *code, void *o, void *v, unsigned n, void *l, void *w, unsigned m) {
    *library = (handle)0x77;
    TELL("load %.3s with %u and %u options\n", code + 1, n, m);
}
static int get_kernel(handle *kernel, handle library, const char *name) {
    return *kernel = (handle)0x99, 0;
}
static int allow(int attribute, int value, handle kernel, int device) {
    TELL("attribute %d of %p on %d is %d\n", attribute, kernel, device, value);
}
static int launch(handle kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, handle stream, void **parameters, void **extra) {
    TELL("launch %p on %u,%u,%u of %u,%u,%u with %u on %p in %p, first %lld, extra %d\n", kernel, gx, gy, gz, bx, by, bz,
         shared, stream, current, *(long long *)parameters[0], extra != 0);
}
static int ask_pointer(int *value, int attribute, uint64_t address) {
    return *value = attribute == 2 ? (address < 4096 ? 1 : 2) : 1, 0;
}
static int make_event(handle *event, unsigned flags) {
    *event = (handle)0x55;
    TELL("event %u\n", flags);
}
static int record(handle event, handle stream) { TELL("record %p on %p\n", event, stream); }
static int wait_for(handle stream, handle event, unsigned flags) { TELL("%p waits for %p\n", stream, event); }
static int explain(int status, const char **words) { return *words = "a word", 0; }

static const struct {
    const char *name;
    void *function;
} table[] = {
    {"cuInit", cuInit}, {"cuDeviceGetCount", cuDeviceGetCount}, {"cuDeviceGetName", cuDeviceGetName},
    {"cuDeviceGetAttribute", cuDeviceGetAttribute}, {"cuDeviceGet", device_get}, {"cuDevicePrimaryCtxRetain", retain},
    {"cuCtxGetCurrent", get_current}, {"cuCtxSetCurrent", set_current}, {"cuMemAllocAsync", allocate},
    {"cuMemFreeAsync", release}, {"cuMemcpyHtoDAsync", copy_in}, {"cuMemcpyDtoHAsync", copy_out},
    {"cuStreamSynchronize", synchronize}, {"cuStreamIsCapturing", is_capturing}, {"cuLibraryLoadData", load},
    {"cuLibraryGetKernel", get_kernel}, {"cuKernelSetAttribute", allow}, {"cuLaunchKernel", launch},
    {"cuPointerGetAttribute", ask_pointer}, {"cuEventCreate", make_event}, {"cuEventRecord", record},
    {"cuStreamWaitEvent", wait_for}, {"cuGetErrorName", explain}, {"cuGetErrorString", explain},
};

int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
    *found = !strncmp(name, "cuGetProcAddress", 16) ? (void *)cuGetProcAddress_v2 : (void *)done;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name)) *found = table[i].function;
    return status ? *status = 0 : 0;
}
int cuGetProcAddress(const char *name, void **found, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
