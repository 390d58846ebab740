/* A prompt and the token behind it, as make_case.py wrote them, compared with Python bit by bit.

   FOLDER/prefill and FOLDER/decode each hold a case: case.txt names the row and the sizes, NAME.bin
   holds a tensor as it lies in memory. The token is decoded in place on the state that the prompt
   left on the device. Exit code 0: all results are bit-identical. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include GLAC_HEADER

/* GLAC(open) is glac_sm90a_open, and so on. */
#define JOINED(prefix, name) prefix##_##name
#define JOIN(prefix, name) JOINED(prefix, name)
#define GLAC(name) JOIN(GLAC_PREFIX, name)

static void fail(const char *what, const char *why) {
  fprintf(stderr, "error: %s: %s\n", what, why);
  exit(1);
}

static void check(CUresult code, const char *what) {
  const char *text = "unknown error";
  if (code == CUDA_SUCCESS) return;
  cuGetErrorString(code, &text);
  fail(what, text);
}

/* The content of FOLDER/NAME.bin; NULL if there is no such file. */
static char *read_file(const char *folder, const char *name, size_t *size) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s.bin", folder, name);
  FILE *file = fopen(path, "rb");
  if (!file) return NULL;
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char *data = malloc(*size ? *size : 1);
  if (!data || fread(data, 1, *size, file) != *size) fail(path, "cannot be read");
  fclose(file);
  return data;
}

/* A tensor of the case on the device; 0 if the case has none of that name. */
static CUdeviceptr upload(const char *folder, const char *name) {
  size_t size = 0;
  char *data = read_file(folder, name, &size);
  CUdeviceptr where = 0;
  if (!data) return 0;
  check(cuMemAlloc(&where, size), "cuMemAlloc");
  check(cuMemcpyHtoD(where, data, size), "cuMemcpyHtoD");
  free(data);
  return where;
}

/* Memory for a result, filled with ones, which are NaN: what is not written shows. */
static CUdeviceptr room_for(const char *folder, const char *name) {
  size_t size = 0;
  char *data = read_file(folder, name, &size);
  CUdeviceptr where = 0;
  if (!data) return 0;
  free(data);
  check(cuMemAlloc(&where, size), "cuMemAlloc");
  check(cuMemsetD8(where, 0xFF, size), "cuMemsetD8");
  return where;
}

/* Bytes in which a result differs from what Python computed. */
static size_t differences(const char *folder, const char *name, CUdeviceptr where) {
  size_t size = 0, count = 0;
  char *wanted = read_file(folder, name, &size);
  char *got = malloc(size ? size : 1);
  if (!wanted || !got) fail(name, "cannot be compared");
  check(cuMemcpyDtoH(got, where, size), "cuMemcpyDtoH");
  for (size_t i = 0; i < size; i++) count += got[i] != wanted[i];
  printf("  %-2s %zu bytes, %zu differ\n", name, size, count);
  free(wanted);
  free(got);
  return count;
}

/* What case.txt says of `key`: its number, and if `text` is given the text itself. */
static double value_of(const char *folder, const char *key, char *text, size_t room) {
  char path[4096], name[64], value[256];
  snprintf(path, sizeof path, "%s/case.txt", folder);
  FILE *file = fopen(path, "r");
  if (!file) fail(path, "cannot be read");
  while (fscanf(file, "%63s %255s", name, value) == 2) {
    if (strcmp(name, key)) continue;
    fclose(file);
    if (text) snprintf(text, room, "%s", value);
    return strtod(value, NULL);
  }
  fail(path, key);
  return 0;
}

static double number(const char *folder, const char *key) { return value_of(folder, key, NULL, 0); }

/* Runs the prompt; `state` is then the state behind it. */
static size_t prefill(glac_handle *handle, const char *folder, CUstream stream,
                      CUdeviceptr *state) {
  char name[256];
  int row = 0;
  value_of(folder, "row", name, sizeof name);
  while (row < GLAC(row_count) && strcmp(GLAC(rows)[row].name, name)) row++;
  if (row == GLAC(row_count)) fail(name, "not among the rows of these sources");

  glac_forward call = {0};
  call.B = (int32_t)number(folder, "B"), call.T = (int32_t)number(folder, "T");
  call.Hq = call.Hk = call.Hs = (int32_t)number(folder, "H");
  call.segment = (int32_t)number(folder, "segment");
  call.scale = number(folder, "scale");
  call.inv_normalizer = number(folder, "inv_normalizer"), call.clamp = number(folder, "clamp");
  call.q = upload(folder, "q"), call.k = upload(folder, "k"), call.v = upload(folder, "v");
  call.g = upload(folder, "g"), call.x = upload(folder, "x"), call.w = upload(folder, "w");
  call.bias = upload(folder, "bias");
  call.o = room_for(folder, "o"), call.ht = *state = room_for(folder, "ht");

  CUdeviceptr workspace = 0;
  size_t size = GLAC(rows)[row].workspace(&call);
  if (size) check(cuMemAlloc(&workspace, size), "cuMemAlloc");
  int code = GLAC(rows)[row].run(handle, &call, workspace, size, stream);
  if (code) fail(name, GLAC(error)(code));
  check(cuStreamSynchronize(stream), name);
  printf("%s: %s, workspace %zu bytes\n", folder, name, size);
  return differences(folder, "o", call.o) + differences(folder, "ht", call.ht);
}

/* Runs the next token and updates `state`. */
static size_t decode(glac_handle *handle, const char *folder, CUstream stream, CUdeviceptr state) {
  char name[256];
  int row = 0;
  value_of(folder, "row", name, sizeof name);
  while (row < GLAC(decode_row_count) && strcmp(GLAC(decode_rows)[row].name, name)) row++;
  if (row == GLAC(decode_row_count)) fail(name, "not among the rows of these sources");

  glac_decode call = {0};
  call.B = (int32_t)number(folder, "B"), call.T = (int32_t)number(folder, "T");
  call.Hq = call.Hk = call.Hs = (int32_t)number(folder, "H");
  call.scale = number(folder, "scale");
  call.inv_normalizer = number(folder, "inv_normalizer"), call.clamp = number(folder, "clamp");
  call.q = upload(folder, "q"), call.k = upload(folder, "k"), call.v = upload(folder, "v");
  call.g = upload(folder, "g"), call.x = upload(folder, "x"), call.w = upload(folder, "w");
  call.bias = upload(folder, "bias");
  call.o = room_for(folder, "o"), call.from = state, call.in_place = 1;

  int code = GLAC(decode_rows)[row].run(handle, &call, stream);
  if (code) fail(name, GLAC(error)(code));
  check(cuStreamSynchronize(stream), name);
  printf("%s: %s\n", folder, name);
  return differences(folder, "o", call.o) + differences(folder, "ht", state);
}

int main(int count, char **arguments) {
  char first[4096], next[4096];
  CUdevice device;
  CUcontext context;
  CUstream stream;
  CUdeviceptr state;
  glac_handle *handle;
  if (count != 2) fail("usage", "serve FOLDER");
  snprintf(first, sizeof first, "%s/prefill", arguments[1]);
  snprintf(next, sizeof next, "%s/decode", arguments[1]);
  check(cuInit(0), "cuInit");
  check(cuDeviceGet(&device, 0), "cuDeviceGet");
  check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
  check(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  int code = GLAC(open)(&handle);
  if (code) fail("opening the kernels", GLAC(error)(code));
  size_t different = prefill(handle, first, stream, &state);
  different += decode(handle, next, stream, state);
  GLAC(close)(handle);
  printf("%s\n", different ? "DIFFERENT" : "bit-identical");
  return different != 0;
}
