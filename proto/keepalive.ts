/** How links notice a peer whose machine is gone without a word. */
import { DeviceKind } from './gen/cluster.js';

/**
 * Options of a channel or server between processes of a group: a peer is asked every 10 s, and given up when it says
 * nothing for 10 s more. WebGPU compiles kernels when they are first needed and keeps its process from answering
 * meanwhile: there the step's own deadline is the limit.
 */
export const keepaliveOptions = (device: DeviceKind) => ({
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': device === DeviceKind.DEVICE_KIND_WEBGPU ? 60_000 : 10_000,
});
