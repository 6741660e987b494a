/* Runs the operations of this library without TensorRT, from C or from what can call C, through the same code that
 * TensorRT's enqueue uses. Any thread may call any function.
 *
 * Tensors are described by
 *   op_type      name of the operation, such as "CrissCrossAttention"
 *   element      data type of all inputs and outputs: "float16", "bfloat16" or "float32"
 *   layout       how 4-D inputs and outputs lie in memory: "linear" (NCHW) or "channels-last" (NHWC); all others and
 *                the workspace are linear, and all are dense
 *   input_count  number of inputs; ranks[i] is the number of axes of input i
 *   dims         sizes of all axes of all inputs, one input after another, in the order of the declaration (NCHW)
 *
 * A function that returns int32_t returns 0, or 1 when it failed; then edgeattn_last_error() says why. */
#ifndef EDGEATTN_C_API_H
#define EDGEATTN_C_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C"
{
#endif
#pragma GCC visibility push(default) /* the library is compiled with hidden symbols */

/* Size in bytes of the workspace, enough for every architecture that the library has kernels for. Needs no GPU. */
int32_t edgeattn_workspace_bytes(char const* op_type, char const* element, char const* layout, int32_t input_count,
    int32_t const* ranks, int64_t const* dims, size_t* bytes);

/* Launches the kernels of an operation on a CUDA stream (a CUstream or cudaStream_t) in the thread's CUDA context, or
 * else in that of the stream, and does not wait for them. All pointers are device memory; the workspace is aligned to
 * 256 bytes, as the CUDA allocators align, and may be null where its size is 0. */
int32_t edgeattn_launch(char const* op_type, char const* element, char const* layout, int32_t input_count,
    int32_t const* ranks, int64_t const* dims, void const* const* inputs, void* const* outputs, void* workspace,
    void* stream);

/* Why this thread's latest call failed, or "". Valid until the thread's next call, like the other texts. */
char const* edgeattn_last_error(void);

/* Which code this thread's latest launch ran instead of machine code for the very architecture of the device, or "". */
char const* edgeattn_last_remark(void);

/* What the library has kernels for, one per line: "op_type, input_count, element, layout, name=size, ..., sm_NN" with
 * the sizes that are compiled in. Null when it failed. */
char const* edgeattn_contents(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
