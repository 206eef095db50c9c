/**
 * CUDA's quick products: ONNX Runtime multiplies with weights of 4 and 8 bits for many rows at once (its fpA_intB kernels),
 * but only with weights that are part of a session's graph, in blocks of 32 around the middle.
 */

/** Options of sessions that switch them on, and say for how many rows their ways are tried out while these are made. */
export const quickProducts: Readonly<Record<string, string>> = {
  'ep.cuda.fpa_intb_gemm': '1',
  'ep.cuda.fpa_intb_profile_m': '1,2,4,8,16,32,64,128,256,512',
};

/** What cuBLAS reads when the first session makes its handle, and eight times 16 KB. */
const CUBLAS_MEMORY = 'CUBLAS_WORKSPACE_CONFIG';
const LITTLE = ':16:8';

/**
 * Has cuBLAS keep little memory, where the user has said nothing: of itself it takes 64 MB for every session, which are
 * gigabytes of a rank that has hundreds. The ways that it takes then are no slower, and for few rows faster. To be called
 * before CUDA is first used.
 */
export function limitCublas(environment: NodeJS.ProcessEnv = process.env): void {
  environment[CUBLAS_MEMORY] ??= LITTLE;
}
