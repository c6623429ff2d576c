/*
 * A GPU that does nothing, for tests on machines without one.
 *
 * This library stands in for CUDA's runtime, driver and cuBLAS under an unmodified PyTorch (CUDA 13 builds). It is put
 * in front of the real libraries by LD_PRELOAD:
 *
 *     gcc -shared -fPIC -O1 -w -I VENV/lib/python3.11/site-packages/triton/backends/nvidia/include \
 *         -Wl,-soname,libcuda.so.1 -o DIR/libcuda.so.1 fake_cuda.c -ldl -lpthread
 *     LD_PRELOAD=DIR/libcuda.so.1 TRITON_LIBCUDA_PATH=DIR python -c "import torch; print(torch.cuda.get_device_name())"
 *
 * Device memory is the host's, copies are made at once, kernels are counted and not run, and the rules of what may be
 * done while a CUDA graph is captured are enforced. All else is PyTorch's own host code: dispatch, devices, dtypes,
 * streams, events, the allocator and its limits, fused optimisers, GradScaler and the capture of graphs.
 *
 * Environment:
 *     FAKE_CUDA_N      number of cards (1)
 *     FAKE_CUDA_GB     memory of each card, in 1e9 bytes (80)
 *     FAKE_CUDA_LOG    if set, say on stderr which call was refused
 *
 * For tests, through ctypes: long fake_cuda_count(const char *what), described at its definition.
 *
 * Limits:
 *     - No kernel runs, so numbers mean nothing: memory holds zeros, or whatever was copied or left there.
 *     - cuDNN inspects the card by itself, so switch it off: torch.backends.cudnn.enabled = False, and for attention in
 *       half precision torch.backends.cuda.enable_cudnn_sdp(False) as well.
 *     - Wheels for CUDA 12 have other signatures and were not tried, nor was NCCL.
 *     - Everything is done when the call returns: nothing here shows a missing wait between two streams.
 *     - One capture at a time; a stream that is forked in a capture and not joined again is not noticed.
 *     - Handles are taken on trust: one that was destroyed or made up is not noticed.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef cudaGetDeviceProperties

#define CUDA_VERSION_REPORTED 13020
#define CARD_NAME "Fake H100"
#define MAX_CARDS 64
#define MAX_ALLOCATIONS 100000

/* A call that does nothing but say that it went well. Its parameters need no names. */
#define SUCCEEDS(name, ...)       \
    cudaError_t name(__VA_ARGS__) \
    {                             \
        return cudaSuccess;       \
    }

/* The same for a library whose header is not included. The caller's arguments are ignored, which the calling
 * conventions of x86-64 and AArch64 allow. */
#define IGNORES_ARGUMENTS(name) \
    int name()                  \
    {                           \
        return 0;               \
    }

/* ---------------------------------------------------------------------------------------------------------------------
 * What is counted.
 */
static atomic_long count_launches;
static atomic_long count_nodes;
static atomic_long count_graphs;
static atomic_long count_waits;
static atomic_long count_allocations;
static atomic_long count_copies;
static atomic_long count_bytes;

/*
 * How often something was done since the process began; -1 for an unknown name.
 *     launches       kernels launched outside of a capture, by the runtime, the driver and cuBLAS
 *     nodes          kernels, copies, fills and host functions recorded in captures
 *     graphs         launches of a graph
 *     waits          calls that make the host wait for the card: cudaDeviceSynchronize, cudaStreamSynchronize,
 *                    cudaEventSynchronize and cudaMemcpy, refused ones included
 *     allocations    calls of cudaMalloc, refused ones included
 *     copies         asynchronous copies
 *     bytes          bytes of all copies
 */
long fake_cuda_count(const char *what)
{
    static const struct {
        const char *name;
        atomic_long *count;
    } counts[] = {
        {"launches", &count_launches}, {"nodes", &count_nodes},   {"graphs", &count_graphs},
        {"waits", &count_waits},       {"copies", &count_copies}, {"allocations", &count_allocations},
        {"bytes", &count_bytes},
    };

    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        if (what && strcmp(what, counts[i].name) == 0) {
            return atomic_load(counts[i].count);
        }
    }
    return -1;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Handles. PyTorch only passes them around, so they can be what we like. Streams and events remember the card that was
 * current when they were made, and the number of the last capture that they took part in.
 */
struct CUstream_st {
    int card;
    int non_blocking; /* the legacy stream of its card does not wait for it */
    long capture_number;
};

struct CUevent_st {
    int card;
    long capture_number;
};

struct CUgraph_st {
    size_t nodes;
};

/* For handles of which nothing needs to be remembered. */
static void *new_handle(void)
{
    return calloc(1, 64);
}

/* Three small numbers are streams that CUDA has from the start: 0 and cudaStreamLegacy are one and the same, the other
 * is cudaStreamPerThread. They belong to whichever card is current. */
static int is_built_in_stream(cudaStream_t stream)
{
    return stream == NULL || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

static int is_legacy_stream(cudaStream_t stream)
{
    return stream == NULL || stream == cudaStreamLegacy;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Errors. As in CUDA, each thread keeps its last one until somebody asks.
 */
static __thread cudaError_t last_error;

static cudaError_t fail(const char *what, cudaError_t error)
{
    last_error = error;
    if (getenv("FAKE_CUDA_LOG")) {
        fprintf(stderr, "[fake_cuda] %s: error %d\n", what, (int)error);
    }
    return error;
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void)
{
    return last_error;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The cards. Each thread has its current one.
 */
static __thread int current_card;

static int card_count(void)
{
    const char *text = getenv("FAKE_CUDA_N");
    int count = text ? atoi(text) : 1;

    if (count < 0) {
        return 0;
    }
    return count < MAX_CARDS ? count : MAX_CARDS;
}

static size_t card_memory(void)
{
    const char *text = getenv("FAKE_CUDA_GB");
    return (size_t)((text ? atof(text) : 80.0) * 1e9);
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = card_count();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *card)
{
    *card = current_card;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int card)
{
    if (card < 0 || card >= card_count()) {
        return fail("cudaSetDevice", cudaErrorInvalidDevice);
    }
    current_card = card;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDA_VERSION_REPORTED;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDA_VERSION_REPORTED;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int card)
{
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, CARD_NAME);
    properties->major = 9;
    properties->minor = 0;
    properties->totalGlobalMem = card_memory();
    properties->totalConstMem = 65536;
    properties->l2CacheSize = 50 << 20;
    properties->memoryBusWidth = 5120;
    properties->multiProcessorCount = 132;
    properties->warpSize = 32;
    properties->sharedMemPerBlock = 49152;
    properties->sharedMemPerBlockOptin = 232448;
    properties->sharedMemPerMultiprocessor = 233472;
    properties->regsPerBlock = 65536;
    properties->regsPerMultiprocessor = 65536;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->maxThreadsDim[0] = 1024;
    properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = 65535;
    properties->maxGridSize[2] = 65535;
    properties->textureAlignment = 512;
    properties->unifiedAddressing = 1;
    properties->managedMemory = 1;
    properties->concurrentKernels = 1;
    properties->asyncEngineCount = 3;
    properties->cooperativeLaunch = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int card)
{
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
        *value = 9;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = 0;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = 132;
        break;
    case cudaDevAttrWarpSize:
        *value = 32;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = 49152;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = 232448;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = 233472;
        break;
    case cudaDevAttrMaxThreadsPerBlock:
        *value = 1024;
        break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *value = 2048;
        break;
    case cudaDevAttrMaxGridDimX:
        *value = 2147483647;
        break;
    case cudaDevAttrMaxGridDimY:
        *value = 65535;
        break;
    default:
        *value = 1;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int card)
{
    snprintf(text, length, "0000:%02x:00.0", card);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int card, int peer)
{
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetLimit(size_t *value, enum cudaLimit limit)
{
    *value = 1 << 20;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int card)
{
    *pool = new_handle();
    return cudaSuccess;
}

SUCCEEDS(cudaDeviceSetLimit, enum cudaLimit, size_t)
SUCCEEDS(cudaProfilerStart, void)
SUCCEEDS(cudaProfilerStop, void)

/* ---------------------------------------------------------------------------------------------------------------------
 * The capture in progress, and what it forbids.
 *
 * CUDA sorts calls into those that are never allowed on a stream that is being captured (to wait for it, to ask whether
 * it is done) and those that are unsafe while any capture goes on (to allocate, to wait for something else). Who may
 * make the unsafe ones depends on the mode of the capture and on the mode of the thread that calls.
 */
static struct {
    int active;
    int invalid;
    int card;
    long number;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    cudaStream_t stream;
    cudaGraph_t graph;
} capture;

static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

/* The stream that the capture began on, or one that joined it by waiting for an event recorded in it. */
static int is_captured_stream(cudaStream_t stream)
{
    if (!capture.active) {
        return 0;
    }
    if (stream == capture.stream) {
        return 1;
    }
    return !is_built_in_stream(stream) && stream->capture_number == capture.number;
}

static int is_captured_event(cudaEvent_t event)
{
    return capture.active && event && event->capture_number == capture.number;
}

static int by_capturing_thread(void)
{
    return pthread_equal(pthread_self(), capture.thread);
}

/* Whether this thread may make no unsafe call now. */
static int unsafe_calls_refused(void)
{
    if (!capture.active || capture.mode == cudaStreamCaptureModeRelaxed) {
        return 0;
    }
    if (thread_mode == cudaStreamCaptureModeRelaxed) {
        return 0;
    }
    if (by_capturing_thread()) {
        return 1;
    }
    return capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
}

/*
 * Whether the current card's legacy stream cannot be used now, because it would wait for the captured stream. It waits
 * for all streams of its card but those that were made not to block it, as all of PyTorch's own are.
 */
static int legacy_stream_refused(void)
{
    if (!capture.active || current_card != capture.card) {
        return 0;
    }
    return is_built_in_stream(capture.stream) || !capture.stream->non_blocking;
}

/* A call that breaks a rule fails, and so does the capture when it ends. */
static cudaError_t break_capture(const char *what, cudaError_t error)
{
    capture.invalid = 1;
    return fail(what, error);
}

static cudaError_t check_unsafe_call(const char *what)
{
    return unsafe_calls_refused() ? break_capture(what, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

/* For calls that wait for a stream, or ask whether it is done. */
static cudaError_t check_wait_for_stream(cudaStream_t stream, const char *what)
{
    int refused = is_captured_stream(stream) || (is_legacy_stream(stream) && legacy_stream_refused());

    refused |= unsafe_calls_refused();
    return refused ? break_capture(what, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

/* For calls that wait for an event, or ask whether it has passed. */
static cudaError_t check_wait_for_event(cudaEvent_t event, const char *what)
{
    if (is_captured_event(event) || unsafe_calls_refused()) {
        return break_capture(what, cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}

/* Work on a captured stream becomes a node of the graph. Returns whether it did. */
static int record_node(cudaStream_t stream)
{
    if (!is_captured_stream(stream)) {
        return 0;
    }
    capture.graph->nodes++;
    count_nodes++;
    return 1;
}

static cudaError_t begin_capture(cudaStream_t stream, cudaGraph_t graph, enum cudaStreamCaptureMode mode)
{
    if (is_legacy_stream(stream)) {
        return fail("capture of the legacy stream", cudaErrorStreamCaptureUnsupported);
    }
    capture.graph = graph ? graph : calloc(1, sizeof *graph);
    capture.stream = stream;
    capture.mode = mode;
    capture.thread = pthread_self();
    capture.card = current_card;
    capture.invalid = 0;
    capture.number++;
    capture.active = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    return begin_capture(stream, NULL, mode);
}

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t *dependencies,
                                          const cudaGraphEdgeData *edges, size_t count, enum cudaStreamCaptureMode mode)
{
    return begin_capture(stream, graph, mode);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    if (!capture.active) {
        return fail("cudaStreamEndCapture without a capture", cudaErrorIllegalState);
    }
    capture.active = 0;
    *graph = capture.graph;
    if (getenv("FAKE_CUDA_LOG")) {
        fprintf(stderr, "[fake_cuda] captured %zu nodes\n", capture.graph->nodes);
    }
    if (capture.invalid) {
        return fail("cudaStreamEndCapture", cudaErrorStreamCaptureInvalidated);
    }
    return cudaSuccess;
}

static enum cudaStreamCaptureStatus capture_status(cudaStream_t stream)
{
    return is_captured_stream(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = capture_status(stream);
    if (is_legacy_stream(stream) && legacy_stream_refused()) {
        return break_capture("cudaStreamIsCapturing of the legacy stream in a capture", cudaErrorStreamCaptureImplicit);
    }
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count)
{
    static cudaGraphNode_t no_nodes[1];

    *status = capture_status(stream);
    if (id) {
        *id = capture.number;
    }
    if (graph) {
        *graph = capture.graph;
    }
    if (dependencies) {
        *dependencies = no_nodes;
    }
    if (edges) {
        *edges = NULL;
    }
    if (count) {
        *count = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    enum cudaStreamCaptureMode old = thread_mode;

    thread_mode = *mode;
    *mode = old;
    return cudaSuccess;
}

SUCCEEDS(cudaStreamUpdateCaptureDependencies, cudaStream_t, cudaGraphNode_t *, const cudaGraphEdgeData *, size_t,
         unsigned)

/* ---------------------------------------------------------------------------------------------------------------------
 * Graphs. One knows how many nodes it has and nothing else; to launch it only counts.
 */
cudaError_t cudaGraphCreate(cudaGraph_t *graph, unsigned flags)
{
    *graph = calloc(1, sizeof **graph);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count)
{
    *count = graph ? graph->nodes : 0;
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies, cudaGraphEdgeData *edges,
                                         size_t *count)
{
    *count = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags)
{
    *executable = new_handle();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags)
{
    return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream)
{
    count_graphs++;
    return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *pointer, cudaHostFn_t destroy, unsigned references,
                                 unsigned flags)
{
    *object = new_handle();
    return cudaSuccess;
}

SUCCEEDS(cudaGraphUpload, cudaGraphExec_t, cudaStream_t)
SUCCEEDS(cudaGraphDestroy, cudaGraph_t)
SUCCEEDS(cudaGraphExecDestroy, cudaGraphExec_t)
SUCCEEDS(cudaGraphRetainUserObject, cudaGraph_t, cudaUserObject_t, unsigned, unsigned)
SUCCEEDS(cudaUserObjectRelease, cudaUserObject_t, unsigned)

/* ---------------------------------------------------------------------------------------------------------------------
 * Streams, and waiting for them or for the whole card.
 */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    *stream = calloc(1, sizeof **stream);
    (*stream)->card = current_card;
    (*stream)->non_blocking = flags == cudaStreamNonBlocking;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithPriority(stream, 0, 0);
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority)
{
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return check_wait_for_stream(stream, "cudaStreamQuery in a capture");
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    count_waits++;
    return check_wait_for_stream(stream, "cudaStreamSynchronize in a capture");
}

/* Refused in every mode, since it waits for the captured stream too; a thread-local capture spares other threads. */
cudaError_t cudaDeviceSynchronize(void)
{
    count_waits++;
    if (legacy_stream_refused()) {
        return break_capture("cudaDeviceSynchronize in a capture", cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}

/* A stream that waits for an event of the capture joins it. A captured stream may wait for no other event. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    if (is_captured_event(event)) {
        if (!is_built_in_stream(stream)) {
            stream->capture_number = capture.number;
        }
    } else if (is_captured_stream(stream)) {
        return break_capture("a captured stream waits for an event outside of the capture",
                             cudaErrorStreamCaptureIsolation);
    }
    return cudaSuccess;
}

/* The function runs at once, or not at all if it becomes part of a graph. */
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data)
{
    if (!record_node(stream)) {
        function(data);
    }
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags)
{
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

SUCCEEDS(cudaStreamDestroy, cudaStream_t)

/* ---------------------------------------------------------------------------------------------------------------------
 * Events. They pass as soon as they are recorded, and all are a millisecond apart.
 */
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    *event = calloc(1, sizeof **event);
    (*event)->card = current_card;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, 0);
}

/* An event can be recorded only on a stream of the card that it was made for. */
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    int card = is_built_in_stream(stream) ? current_card : stream->card;

    if (event == NULL || event->card != card) {
        return fail("cudaEventRecord on a stream of another card", cudaErrorInvalidResourceHandle);
    }
    event->capture_number = is_captured_stream(stream) ? capture.number : 0;
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags)
{
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    return check_wait_for_event(event, "cudaEventQuery in a capture");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    count_waits++;
    return check_wait_for_event(event, "cudaEventSynchronize in a capture");
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    *milliseconds = 1;
    return cudaSuccess;
}

SUCCEEDS(cudaEventDestroy, cudaEvent_t)

/* ---------------------------------------------------------------------------------------------------------------------
 * Memory. A table says of every range what it is, and of which card. Device memory is mapped without being reserved, so
 * a test may fill a card of 80 GB as long as it doesn't touch it all.
 */
enum memory { MEMORY_FREE, MEMORY_HOST, MEMORY_DEVICE };

static struct allocation {
    char *start;
    size_t bytes;
    int card;
    enum memory memory;
} allocations[MAX_ALLOCATIONS];

static int allocation_end; /* All entries from here on are free. */
static size_t used_bytes[MAX_CARDS];
static pthread_mutex_t allocation_lock = PTHREAD_MUTEX_INITIALIZER;

static void remember(void *start, size_t bytes, enum memory memory)
{
    int i = 0;

    pthread_mutex_lock(&allocation_lock);
    while (i < allocation_end && allocations[i].memory != MEMORY_FREE) {
        i++;
    }
    if (i == MAX_ALLOCATIONS) {
        fprintf(stderr, "[fake_cuda] more than %d allocations\n", MAX_ALLOCATIONS);
        abort();
    }
    if (i == allocation_end) {
        allocation_end++;
    }
    allocations[i] = (struct allocation){start, bytes, current_card, memory};
    pthread_mutex_unlock(&allocation_lock);
}

/* Returns what was known of the range that begins there. */
static struct allocation forget(void *start)
{
    struct allocation found = {0};

    pthread_mutex_lock(&allocation_lock);
    for (int i = 0; i < allocation_end; i++) {
        if (allocations[i].memory != MEMORY_FREE && allocations[i].start == start) {
            found = allocations[i];
            allocations[i].memory = MEMORY_FREE;
            break;
        }
    }
    if (found.memory == MEMORY_DEVICE) {
        used_bytes[found.card] -= found.bytes;
    }
    pthread_mutex_unlock(&allocation_lock);
    return found;
}

/* Returns what is known of the range that the pointer lies in; MEMORY_FREE: nothing, it is the host's own. */
static struct allocation find(const void *pointer)
{
    struct allocation found = {0};

    pthread_mutex_lock(&allocation_lock);
    for (int i = 0; i < allocation_end; i++) {
        const struct allocation *entry = &allocations[i];
        if (entry->memory == MEMORY_FREE || (char *)pointer < entry->start) {
            continue;
        }
        if ((char *)pointer < entry->start + entry->bytes) {
            found = *entry;
            break;
        }
    }
    pthread_mutex_unlock(&allocation_lock);
    return found;
}

/* Takes the bytes from the current card. Returns whether there was room. */
static int take_bytes(size_t bytes)
{
    int room;

    pthread_mutex_lock(&allocation_lock);
    room = bytes <= card_memory() && used_bytes[current_card] <= card_memory() - bytes;
    if (room) {
        used_bytes[current_card] += bytes;
    }
    pthread_mutex_unlock(&allocation_lock);
    return room;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes)
{
    size_t mapped = bytes ? bytes : 1;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    cudaError_t error = check_unsafe_call("cudaMalloc in a capture");

    count_allocations++;
    if (error) {
        return error;
    }
    if (!take_bytes(mapped)) {
        return fail("cudaMalloc", cudaErrorMemoryAllocation);
    }
    *pointer = mmap(NULL, mapped, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (*pointer == MAP_FAILED) {
        pthread_mutex_lock(&allocation_lock);
        used_bytes[current_card] -= mapped;
        pthread_mutex_unlock(&allocation_lock);
        return fail("cudaMalloc: the host has no room", cudaErrorMemoryAllocation);
    }
    remember(*pointer, mapped, MEMORY_DEVICE);
    return cudaSuccess;
}

cudaError_t cudaFree(void *pointer)
{
    struct allocation found;
    cudaError_t error;

    if (pointer == NULL) {
        return cudaSuccess;
    }
    error = check_unsafe_call("cudaFree in a capture");
    if (error) {
        return error;
    }
    found = forget(pointer);
    if (found.memory == MEMORY_DEVICE) {
        munmap(pointer, found.bytes);
    }
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    pthread_mutex_lock(&allocation_lock);
    *total_bytes = card_memory();
    *free_bytes = *total_bytes - used_bytes[current_card];
    pthread_mutex_unlock(&allocation_lock);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags)
{
    size_t size = bytes ? bytes : 1;
    cudaError_t error = check_unsafe_call("cudaHostAlloc in a capture");

    if (error) {
        return error;
    }
    if (posix_memalign(pointer, 4096, size)) {
        return fail("cudaHostAlloc", cudaErrorMemoryAllocation);
    }
    memset(*pointer, 0, size);
    remember(*pointer, size, MEMORY_HOST);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **pointer, size_t bytes)
{
    return cudaHostAlloc(pointer, bytes, 0);
}

cudaError_t cudaFreeHost(void *pointer)
{
    forget(pointer);
    free(pointer);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags)
{
    remember(pointer, bytes, MEMORY_HOST);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer)
{
    forget(pointer);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer)
{
    struct allocation found = find(pointer);

    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
    if (found.memory != MEMORY_FREE) {
        attributes->type = found.memory == MEMORY_DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
        attributes->device = found.card;
        attributes->devicePointer = (void *)pointer;
    }
    if (found.memory == MEMORY_HOST) {
        attributes->hostPointer = (void *)pointer;
    }
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol)
{
    *pointer = calloc(1, 4096);
    return cudaSuccess;
}

SUCCEEDS(cudaMemcpyToSymbol, const void *, const void *, size_t, size_t, enum cudaMemcpyKind)
SUCCEEDS(cudaIpcGetMemHandle, cudaIpcMemHandle_t *, void *)

/* ---------------------------------------------------------------------------------------------------------------------
 * Copies and fills. They are made at once, in a capture as well.
 */
static void warn_of_pageable_memory(const void *to, const void *from)
{
    const char *where = NULL;

    if (find(from).memory == MEMORY_FREE) {
        where = "from";
    } else if (find(to).memory == MEMORY_FREE) {
        where = "to";
    }
    if (where) {
        fprintf(stderr, "[fake_cuda] WARNING: capture of a copy %s pageable host memory\n", where);
    }
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    count_copies++;
    count_bytes += bytes;
    if (record_node(stream)) {
        warn_of_pageable_memory(to, from);
    }
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_card, const void *from, int from_card, size_t bytes,
                                cudaStream_t stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    cudaError_t error = check_wait_for_stream(NULL, "cudaMemcpy in a capture");

    count_waits++;
    if (error) {
        return error;
    }
    count_bytes += bytes;
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *pointer, int value, size_t bytes)
{
    memset(pointer, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream)
{
    record_node(stream);
    memset(pointer, value, bytes);
    return cudaSuccess;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Kernels. They are counted and not run.
 */
static cudaError_t launch(cudaStream_t stream)
{
    if (record_node(stream)) {
        return cudaSuccess;
    }
    if (is_legacy_stream(stream) && legacy_stream_refused()) {
        return break_capture("launch on the legacy stream in a capture", cudaErrorStreamCaptureImplicit);
    }
    count_launches++;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                             cudaStream_t stream)
{
    return launch(stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                        size_t shared_bytes, cudaStream_t stream)
{
    return launch(stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments)
{
    return launch(config->stream);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                               cudaStream_t stream)
{
    return launch(stream);
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function)
{
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

/* A launch written as kernel<<<grid, block, shared_bytes, stream>>> is compiled to a push of the four and a call of a
 * function that pops them again. */
static __thread struct {
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
    cudaStream_t stream;
} pushed[16];

static __thread int pushed_count;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st *stream)
{
    if (pushed_count == sizeof pushed / sizeof pushed[0]) {
        return 1;
    }
    pushed[pushed_count].grid = grid;
    pushed[pushed_count].block = block;
    pushed[pushed_count].shared_bytes = shared_bytes;
    pushed[pushed_count].stream = stream;
    pushed_count++;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream)
{
    if (pushed_count == 0) {
        return fail("launch without a configuration", cudaErrorMissingConfiguration);
    }
    pushed_count--;
    *grid = pushed[pushed_count].grid;
    *block = pushed[pushed_count].block;
    *shared_bytes = pushed[pushed_count].shared_bytes;
    *(cudaStream_t *)stream = pushed[pushed_count].stream;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = 90;
    attributes->ptxVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                          size_t shared_bytes)
{
    *blocks = 4;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared_bytes, unsigned flags)
{
    *blocks = 4;
    return cudaSuccess;
}

SUCCEEDS(cudaFuncSetAttribute, const void *, enum cudaFuncAttribute, int)
SUCCEEDS(cudaKernelSetAttributeForDevice, cudaKernel_t, enum cudaFuncAttribute, int, int)

/* ---------------------------------------------------------------------------------------------------------------------
 * The way from the runtime to the driver. This library has the driver's name (libcuda.so.1), so it finds itself.
 */
static void *driver_function(const char *name)
{
    static void *driver;

    if (driver == NULL) {
        driver = dlopen("libcuda.so.1", RTLD_NOW);
    }
    return driver ? dlsym(driver, name) : NULL;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result)
{
    *function = driver_function(name);
    if (result) {
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    }
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result)
{
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * cuBLAS. Its handle remembers the stream that it was given; every product is one kernel on that stream.
 */
struct blas_handle {
    cudaStream_t stream;
};

enum { BLAS_SUCCESS = 0, BLAS_EXECUTION_FAILED = 13 };

static int blas_launch(cudaStream_t stream)
{
    return launch(stream) ? BLAS_EXECUTION_FAILED : BLAS_SUCCESS;
}

/* The arguments after the handle are ignored. */
#define BLAS_KERNEL(name)                    \
    int name(struct blas_handle *handle)     \
    {                                        \
        return blas_launch(handle->stream);  \
    }

BLAS_KERNEL(cublasSgemm_v2)
BLAS_KERNEL(cublasSgemmEx)
BLAS_KERNEL(cublasSgemmStridedBatched)
BLAS_KERNEL(cublasDgemm_v2)
BLAS_KERNEL(cublasDgemmStridedBatched)
BLAS_KERNEL(cublasHgemm)
BLAS_KERNEL(cublasHgemmStridedBatched)
BLAS_KERNEL(cublasGemmEx)
BLAS_KERNEL(cublasGemmStridedBatchedEx)
BLAS_KERNEL(cublasSgemv_v2)
BLAS_KERNEL(cublasDgemv_v2)
BLAS_KERNEL(cublasSdot_v2)
BLAS_KERNEL(cublasDdot_v2)
BLAS_KERNEL(cublasDotEx)

int cublasCreate_v2(struct blas_handle **handle)
{
    *handle = calloc(1, sizeof **handle);
    return BLAS_SUCCESS;
}

int cublasSetStream_v2(struct blas_handle *handle, cudaStream_t stream)
{
    handle->stream = stream;
    return BLAS_SUCCESS;
}

int cublasGetMathMode(struct blas_handle *handle, int *mode)
{
    *mode = 0;
    return BLAS_SUCCESS;
}

int cublasGetPointerMode_v2(struct blas_handle *handle, int *mode)
{
    *mode = 0;
    return BLAS_SUCCESS;
}

IGNORES_ARGUMENTS(cublasDestroy_v2)
IGNORES_ARGUMENTS(cublasSetWorkspace_v2)
IGNORES_ARGUMENTS(cublasSetMathMode)
IGNORES_ARGUMENTS(cublasSetPointerMode_v2)
IGNORES_ARGUMENTS(cublasSetSmCountTarget)

size_t cublasLtGetVersion(void)
{
    return 130200;
}

int cublasLtMatmul(void *handle, void *description, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *algorithm, void *workspace, size_t workspace_bytes, cudaStream_t stream)
{
    return blas_launch(stream);
}

/* There is always one algorithm to choose from. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a_layout, void *b_layout, void *c_layout,
                                   void *d_layout, void *preference, int wanted, void *results, int *found)
{
    *found = 1;
    return BLAS_SUCCESS;
}

/* The first argument is where the new handle goes. */
#define BLAS_CREATES(name)         \
    int name(void **handle)        \
    {                              \
        *handle = new_handle();    \
        return BLAS_SUCCESS;       \
    }

BLAS_CREATES(cublasLtMatmulDescCreate)
BLAS_CREATES(cublasLtMatmulPreferenceCreate)
BLAS_CREATES(cublasLtMatrixLayoutCreate)

/* A product makes several of these and they would add up, so here the memory is given back. */
#define BLAS_DESTROYS(name)     \
    int name(void *handle)      \
    {                           \
        free(handle);           \
        return BLAS_SUCCESS;    \
    }

BLAS_DESTROYS(cublasLtMatmulDescDestroy)
BLAS_DESTROYS(cublasLtMatmulPreferenceDestroy)
BLAS_DESTROYS(cublasLtMatrixLayoutDestroy)

IGNORES_ARGUMENTS(cublasLtMatmulDescSetAttribute)
IGNORES_ARGUMENTS(cublasLtMatmulPreferenceSetAttribute)
IGNORES_ARGUMENTS(cublasLtMatrixLayoutSetAttribute)

/* ---------------------------------------------------------------------------------------------------------------------
 * The driver, as far as PyTorch and Triton call it. Its header is not included, so that calls that do nothing need no
 * full declaration; handles are small numbers, and the values of its enums that matter are named here.
 */
#define DRIVER_CONTEXT ((void *)8)
#define DRIVER_MODULE ((void *)16)
#define DRIVER_FUNCTION ((void *)32)

enum { DRIVER_SUCCESS = 0, DRIVER_INVALID_DEVICE = 101, DRIVER_NOT_FOUND = 500, DRIVER_CAPTURE_IMPLICIT = 906 };

enum driver_device_attribute {
    DRIVER_MAX_THREADS_PER_BLOCK = 1,
    DRIVER_MAX_SHARED_MEMORY_PER_BLOCK = 8,
    DRIVER_WARP_SIZE = 10,
    DRIVER_MAX_REGISTERS_PER_BLOCK = 12,
    DRIVER_CLOCK_RATE = 13,
    DRIVER_MULTIPROCESSOR_COUNT = 16,
    DRIVER_MEMORY_CLOCK_RATE = 36,
    DRIVER_MEMORY_BUS_WIDTH = 37,
    DRIVER_MAX_THREADS_PER_MULTIPROCESSOR = 39,
    DRIVER_COMPUTE_CAPABILITY_MAJOR = 75,
    DRIVER_COMPUTE_CAPABILITY_MINOR = 76,
    DRIVER_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
    DRIVER_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
};

enum driver_function_attribute { DRIVER_FUNCTION_MAX_THREADS_PER_BLOCK = 0, DRIVER_FUNCTION_REGISTERS = 4 };

/* The beginning of CUlaunchConfig. */
struct driver_launch_config {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    cudaStream_t stream;
};

int cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION_REPORTED;
    return DRIVER_SUCCESS;
}

int cuDeviceGetCount(int *count)
{
    *count = card_count();
    return DRIVER_SUCCESS;
}

int cuDeviceGet(int *device, int ordinal)
{
    if (ordinal < 0 || ordinal >= card_count()) {
        return DRIVER_INVALID_DEVICE;
    }
    *device = ordinal;
    return DRIVER_SUCCESS;
}

int cuDeviceGetName(char *name, int length, int device)
{
    snprintf(name, length, "%s", CARD_NAME);
    return DRIVER_SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    *bytes = card_memory();
    return DRIVER_SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    switch (attribute) {
    case DRIVER_COMPUTE_CAPABILITY_MAJOR:
        *value = 9;
        break;
    case DRIVER_COMPUTE_CAPABILITY_MINOR:
        *value = 0;
        break;
    case DRIVER_MULTIPROCESSOR_COUNT:
        *value = 132;
        break;
    case DRIVER_WARP_SIZE:
        *value = 32;
        break;
    case DRIVER_MAX_THREADS_PER_BLOCK:
        *value = 1024;
        break;
    case DRIVER_MAX_THREADS_PER_MULTIPROCESSOR:
        *value = 2048;
        break;
    case DRIVER_MAX_REGISTERS_PER_BLOCK:
        *value = 65536;
        break;
    case DRIVER_MAX_SHARED_MEMORY_PER_BLOCK:
        *value = 49152;
        break;
    case DRIVER_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = 232448;
        break;
    case DRIVER_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
        *value = 233472;
        break;
    case DRIVER_CLOCK_RATE:
        *value = 1980000;
        break;
    case DRIVER_MEMORY_CLOCK_RATE:
        *value = 2619000;
        break;
    case DRIVER_MEMORY_BUS_WIDTH:
        *value = 5120;
        break;
    default:
        *value = 1;
    }
    return DRIVER_SUCCESS;
}

/* Every card has the same context, which always exists. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    if (flags) {
        *flags = 0;
    }
    *active = 1;
    return DRIVER_SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    *context = DRIVER_CONTEXT;
    return DRIVER_SUCCESS;
}

int cuCtxGetCurrent(void **context)
{
    *context = DRIVER_CONTEXT;
    return DRIVER_SUCCESS;
}

int cuCtxGetDevice(int *device)
{
    *device = current_card;
    return DRIVER_SUCCESS;
}

int cuCtxGetLimit(size_t *value, int limit)
{
    *value = 1 << 20;
    return DRIVER_SUCCESS;
}

int cuGetErrorString(int error, const char **text)
{
    *text = "fake error";
    return DRIVER_SUCCESS;
}

int cuGetErrorName(int error, const char **text)
{
    *text = "FAKE";
    return DRIVER_SUCCESS;
}

int cuModuleLoad(void **module, const char *path)
{
    *module = DRIVER_MODULE;
    return DRIVER_SUCCESS;
}

int cuModuleLoadData(void **module, const void *image)
{
    *module = DRIVER_MODULE;
    return DRIVER_SUCCESS;
}

int cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void *values)
{
    *module = DRIVER_MODULE;
    return DRIVER_SUCCESS;
}

int cuLibraryLoadData(void **library)
{
    *library = DRIVER_MODULE;
    return DRIVER_SUCCESS;
}

int cuModuleGetFunction(void **function, void *module, const char *name)
{
    *function = DRIVER_FUNCTION;
    return DRIVER_SUCCESS;
}

int cuFuncGetAttribute(int *value, int attribute, void *function)
{
    switch (attribute) {
    case DRIVER_FUNCTION_MAX_THREADS_PER_BLOCK:
        *value = 1024;
        break;
    case DRIVER_FUNCTION_REGISTERS:
        *value = 32;
        break;
    default:
        *value = 0;
    }
    return DRIVER_SUCCESS;
}

int cuOccupancyMaxActiveClusters(int *clusters, void *function, void *config)
{
    *clusters = 1;
    return DRIVER_SUCCESS;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks)
{
    *blocks = 4;
    return DRIVER_SUCCESS;
}

/* Triton asks for the device's view of a pointer, which is the pointer itself. */
int cuPointerGetAttribute(void *value, int attribute, unsigned long pointer)
{
    *(unsigned long *)value = pointer;
    return DRIVER_SUCCESS;
}

int cuStreamIsCapturing(cudaStream_t stream, int *status)
{
    *status = capture_status(stream);
    return DRIVER_SUCCESS;
}

static int driver_launch(cudaStream_t stream)
{
    return launch(stream) ? DRIVER_CAPTURE_IMPLICIT : DRIVER_SUCCESS;
}

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, cudaStream_t stream, void **arguments,
                   void **extra)
{
    return driver_launch(stream);
}

int cuLaunchCooperativeKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                              unsigned block_y, unsigned block_z, unsigned shared_bytes, cudaStream_t stream,
                              void **arguments)
{
    return driver_launch(stream);
}

int cuLaunchKernelEx(const struct driver_launch_config *config, void *function, void **arguments, void **extra)
{
    return driver_launch(config->stream);
}

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags, int *result)
{
    *function = dlsym(RTLD_DEFAULT, name);
    if (*function == NULL) {
        *function = driver_function(name);
    }
    if (result) {
        *result = *function ? 0 : 1;
    }
    return *function ? DRIVER_SUCCESS : DRIVER_NOT_FOUND;
}

int cuGetProcAddress(const char *name, void **function, int version, unsigned long flags, int *result)
{
    return cuGetProcAddress_v2(name, function, version, flags, result);
}

IGNORES_ARGUMENTS(cuInit)
IGNORES_ARGUMENTS(cuCtxSetCurrent)
IGNORES_ARGUMENTS(cuCtxPushCurrent_v2)
IGNORES_ARGUMENTS(cuCtxPopCurrent_v2)
IGNORES_ARGUMENTS(cuCtxSetLimit)
IGNORES_ARGUMENTS(cuFuncSetAttribute)
IGNORES_ARGUMENTS(cuFuncSetCacheConfig)
IGNORES_ARGUMENTS(cuLinkCreate_v2)
IGNORES_ARGUMENTS(cuLinkAddData_v2)
IGNORES_ARGUMENTS(cuLinkComplete)
IGNORES_ARGUMENTS(cuModuleUnload)
IGNORES_ARGUMENTS(cuPointerSetAttribute)
IGNORES_ARGUMENTS(cuTensorMapEncodeTiled)
