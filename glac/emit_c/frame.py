"""C text that is the same whatever rows a pack has: the header around calls and rows, the code of
kernels, the driver, and the checks that all functions make.
"""

from __future__ import annotations

HEADER = """\
/* Gated linear attention: kernels for @ARCH@ and their launches. Made by glac @VERSION@
   (@TOOLS@); do not edit, run `glac build --emit c` again.

   @KERNELS@ kernels, @COUNT@ rows. Needs a driver for CUDA @CUDA@ (branch @FLOOR@) or newer, and
   -ldl where the C library keeps dlopen apart. There is no global state: what is loaded is in a
   handle, which belongs to the CUDA context that was current when it was opened. A handle may be
   used from several threads at once; calls only enqueue work on `stream` and never wait. */
#ifndef @UPPER@_H
#define @UPPER@_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef GLAC_CODES_DEFINED
#define GLAC_CODES_DEFINED

/* What a function returns: 0, one of these, or a positive CUresult of the driver. */
enum {
  GLAC_OK = 0,
  GLAC_NULL = -1,      /* a pointer that must be there is 0 */
  GLAC_ALIGNMENT = -2, /* a pointer is not a multiple of 16 bytes, or of what it is said to be */
  GLAC_SIZE = -3,      /* a size is below 1 or too large, or head counts do not divide */
  GLAC_STRIDE = -4,    /* a stride is one that the kernels cannot count in */
  GLAC_WORKSPACE = -5, /* the workspace is smaller than the function's size query says */
  GLAC_DEVICE = -6,    /* the current device does not run this code */
  GLAC_DRIVER = -7,    /* there is no CUDA driver, or it is too old */
  GLAC_MEMORY = -8,    /* no host memory */
  GLAC_SEGMENT = -9,   /* the function cannot cut sequences into segments of this length */
  GLAC_VALUE = -10     /* a field has none of its values, or excludes another one */
};

#endif /* GLAC_CODES_DEFINED */

/* In a call pointers are device addresses, multiples of 16 bytes but for those to int32 and int64.
   Shapes are [batch, tokens, heads, channels] with the channels contiguous; strides count
   elements, and all of a tensor at 0 stand for a contiguous one. A low-rank gate has x
   [batch, tokens, rank], w [Hs * K, rank] and bias [Hs * K] instead of g:
   g = max(logsigmoid(x w^T + bias) * inv_normalizer, clamp), computed in the kernel. */
@CALLS@
#ifndef GLAC_HANDLE_DEFINED
#define GLAC_HANDLE_DEFINED
typedef struct glac_handle glac_handle;
#endif

/* Load all kernels into the current CUDA context. */
int @PREFIX@_open(glac_handle **handle);

/* Unload them; their context must be current and their work done. 0 is allowed. */
void @PREFIX@_close(glac_handle *handle);

/* What a code stands for, in English; of a CUresult its number has to do. */
const char *@PREFIX@_error(int code);
@TABLES@
#ifdef __cplusplus
}
#endif

#endif
"""

TABLE = """
/* @ABOUT_ROW@ */
typedef struct @PREFIX@_@ROW@ {
  const char *name;
  const char *gpu;
  const char *dtype, *gate, *gate_dtype; /* bf16, fp16, fp32; vector, lowrank, scalar */
  int32_t K, V, rank;
  int32_t log2_heads, log2_tokens; /* rounded log2 of sequences * heads, and of their tokens */
  int32_t tuned;
@ROW_FIELDS@
} @PREFIX@_@ROW@;

extern const @PREFIX@_@ROW@ @PREFIX@_@ROW@s[];
extern const int @PREFIX@_@ROW@_count;

@ABOUT_FUNCTIONS@

@DECLARATIONS@
"""
"""The part of the header about the rows of one kind of call."""

SOURCE = """\
/* Made by glac @VERSION@; see the header. */
#include "glac_@ARCH@.h"

#include <dlfcn.h>
#include <stdlib.h>

#define STEP_MIN (@STEP_MIN@)
#define LOG2E (@LOG2E@)

/* Machine code, as little-endian words. */

@CODE@

typedef struct kernel_info {
  const uint64_t *code;
  const char *symbol;
  unsigned shared; /* bytes of dynamic shared memory */
  unsigned threads;
} kernel_info;

enum { KERNELS = @KERNELS@ };

static const kernel_info kernels[KERNELS] = {
@KERNEL_LIST@
};

/* The driver, as far as it is used: opened at run time, so nothing of CUDA is needed to build. */
typedef int (*get_version_t)(int *);
typedef int (*get_device_t)(int *);
typedef int (*get_attribute_t)(int *, int, int);
typedef int (*load_t)(void **, const void *);
typedef int (*unload_t)(void *);
typedef int (*get_function_t)(void **, void *, const char *);
typedef int (*set_attribute_t)(void *, int, int);
typedef int (*launch_t)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, void *, void **, void **);

enum { VECTOR_GATE, LOWRANK_GATE, SCALAR_GATE };

struct glac_handle {
  void *library;
  unload_t unload;
  launch_t launch;
  void *modules[KERNELS];
  void *functions[KERNELS];
};

/* ISO C has no conversion from an object pointer to a function pointer; POSIX asks for one. */
static int symbol_of(void *library, const char *name, void *into) {
  void *found = dlsym(library, name);
  *(void **)into = found;
  return found ? 0 : GLAC_DRIVER;
}

void @PREFIX@_close(glac_handle *handle) {
  if (!handle) return;
  for (int i = 0; i < KERNELS; i++)
    if (handle->modules[i]) handle->unload(handle->modules[i]);
  if (handle->library) dlclose(handle->library);
  free(handle);
}

static int open_into(glac_handle *handle) {
  get_version_t get_version;
  get_device_t get_device;
  get_attribute_t get_attribute;
  load_t load;
  get_function_t get_function;
  set_attribute_t set_attribute;
  handle->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle->library) return GLAC_DRIVER;
  if (symbol_of(handle->library, "cuDriverGetVersion", &get_version) ||
      symbol_of(handle->library, "cuCtxGetDevice", &get_device) ||
      symbol_of(handle->library, "cuDeviceGetAttribute", &get_attribute) ||
      symbol_of(handle->library, "cuModuleLoadData", &load) ||
      symbol_of(handle->library, "cuModuleUnload", &handle->unload) ||
      symbol_of(handle->library, "cuModuleGetFunction", &get_function) ||
      symbol_of(handle->library, "cuFuncSetAttribute", &set_attribute) ||
      symbol_of(handle->library, "cuLaunchKernel", &handle->launch))
    return GLAC_DRIVER;
  int version = 0, device = 0, major = 0, minor = 0, shared = 0;
  int status = get_version(&version);
  if (status) return status;
  if (version < @CUDA_NUMBER@) return GLAC_DRIVER;
  if ((status = get_device(&device)) || (status = get_attribute(&major, 75, device)) ||
      (status = get_attribute(&minor, 76, device)) ||
      (status = get_attribute(&shared, 97, device)))
    return status;
  if (major != @MAJOR@ || (@EXACT@ ? minor != @MINOR@ : minor < @MINOR@)) return GLAC_DEVICE;
  for (int i = 0; i < KERNELS; i++) {
    /* A kernel that the device cannot hold stays unloaded; calling it is GLAC_DEVICE. */
    if (kernels[i].shared > (unsigned)shared) continue;
    if ((status = load(&handle->modules[i], kernels[i].code))) return status;
    status = get_function(&handle->functions[i], handle->modules[i], kernels[i].symbol);
    if (status) return status;
    if (kernels[i].shared > 48 * 1024) {
      status = set_attribute(handle->functions[i], 8, (int)kernels[i].shared);
      if (status) return status;
    }
  }
  return GLAC_OK;
}

int @PREFIX@_open(glac_handle **handle) {
  if (!handle) return GLAC_NULL;
  *handle = NULL;
  glac_handle *made = calloc(1, sizeof *made);
  if (!made) return GLAC_MEMORY;
  int status = open_into(made);
  if (status) {
    @PREFIX@_close(made);
    return status;
  }
  *handle = made;
  return GLAC_OK;
}

const char *@PREFIX@_error(int code) {
  switch (code) {
    case GLAC_OK: return "done";
    case GLAC_NULL: return "a pointer that must be there is 0";
    case GLAC_ALIGNMENT: return "a pointer is not a multiple of 16 bytes, or of an index or a "
                                "number that it points to";
    case GLAC_SIZE: return "a size is below 1 or too large, or head counts do not divide";
    case GLAC_STRIDE: return "a stride is one that the kernels cannot count in";
    case GLAC_WORKSPACE: return "the workspace is too small";
    case GLAC_DEVICE: return "the current device does not run code for @ARCH@, or has too little "
                             "shared memory for this kernel";
    case GLAC_DRIVER: return "no CUDA driver, or one older than for CUDA @CUDA@";
    case GLAC_MEMORY: return "no host memory";
    case GLAC_SEGMENT: return "a segment is no multiple of the row's step, or the row cannot cut";
    case GLAC_VALUE: return "a dtype or a size of indices is none that there is, or states are "
                            "wanted in place and elsewhere";
    default: return code > 0 ? "an error of the CUDA driver (CUresult)" : "an unknown code";
  }
}

static void strides(int64_t *b, int64_t *t, int64_t *h, int64_t T, int64_t heads, int64_t dim) {
  if (*b || *t || *h) return;
  *h = dim;
  *t = heads * dim;
  *b = T * heads * dim;
}

/* Batch, token and head stride, in units of `unit` elements. */
static int strides_fit(int64_t b, int64_t t, int64_t h, int64_t unit) {
  if (b < 0 || t < 0 || h < 0 || b % unit || t % unit || h % unit) return 0;
  return b / unit <= 2147483647 && t / unit <= 2147483647 && h / unit <= 2147483647;
}

static int check_sizes(int64_t B, int64_t T, int64_t Hq, int64_t Hk, int64_t Hs, int packed,
                       int64_t N, int64_t width) {
  if (B < 1 || T < 1 || T > @MAX_TOKENS@ || Hq < 1 || Hk < 1 || Hs < 1) return GLAC_SIZE;
  if (Hs % Hk || (Hs % Hq && Hq % Hs) || (packed && (N < 1 || B != 1))) return GLAC_SIZE;
  return (Hq > Hs ? Hq : Hs) * width < @MAX_TOKEN_STRIDE@ ? GLAC_OK : GLAC_SIZE;
}

static int launch(const glac_handle *handle, int kernel, int64_t grid, void *stream,
                  void **arguments) {
  if (!handle->functions[kernel]) return GLAC_DEVICE;
  return handle->launch(handle->functions[kernel], (unsigned)grid, 1, 1, kernels[kernel].threads,
                        1, 1, kernels[kernel].shared, stream, arguments, NULL);
}
"""

ROWS = """
@FUNCTIONS@
const @PREFIX@_@ROW@ @PREFIX@_@ROW@s[] = {
@ENTRIES@
};

const int @PREFIX@_@ROW@_count = sizeof @PREFIX@_@ROW@s / sizeof @PREFIX@_@ROW@s[0];
"""
"""The part of the source about the rows of one kind of call."""
