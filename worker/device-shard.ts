/**
 * A shard on a device: one rank's slices of the model as device tensors. It knows nothing of slots or steps.
 */
import type { DeviceKind } from '../model/device-name.js';
import type { LlamaConfig } from '../model/config.js';
import {
  slicesOf,
  type LayerSlices,
  type RankPlan,
  type RankSlices,
  type TensorSlice,
} from '../model/plan.js';
import { weightBytes, type WeightForm, type WeightForms } from '../model/weights.js';
import type { DeviceShape, MatrixShape } from './device-graph.js';
import { CAPTURED_LENGTHS } from './device-launch.js';
import type { Linear } from './linear.js';
import { elementType, type ElementType } from './ort.js';
import type { DeviceTensor } from './device-tensor.js';
import type { OrtDevice } from './ort-device.js';
import type { Provider } from './ort-provider.js';

const { float32, float16 } = elementType;

/** Where a shard's weights come from, in host memory. */
export interface MatrixSource {
  /** Bytes of the checkpoint that were read so far. */
  readonly bytesRead: number;
  vector(slice: TensorSlice): Promise<Float32Array>;
  /** One matrix of the rows of all parts, in each of the forms; of float16 in float32. */
  matrix(forms: readonly WeightForm[], ...parts: TensorSlice[]): Promise<Linear[]>;
  /** The arrays of a matrix may be written again. */
  giveBack(matrix: Linear): void;
  close(): void;
}

/** A matrix on the device: its weights and, with 4 bits, scales and zeros, by the names of a graph's inputs. */
export interface DeviceMatrix extends MatrixShape {
  readonly tensors: ReadonlyMap<'weight' | 'scales' | 'zeros', DeviceTensor>;
}

export interface DeviceLayer {
  readonly attentionNorm: DeviceTensor;
  readonly qkv: DeviceMatrix;
  readonly o: DeviceMatrix;
  readonly ffnNorm: DeviceTensor;
  readonly gate: DeviceMatrix;
  readonly up: DeviceMatrix;
  readonly down: DeviceMatrix;
}

export class DeviceShard {
  readonly shape: DeviceShape;
  /** (vocab + 1, hidden): the last row is zeros. */
  readonly embedding: DeviceTensor;
  readonly layers: readonly DeviceLayer[];
  readonly norm: DeviceTensor;
  readonly head: DeviceMatrix;
  /** Bytes of weights as held in memory. */
  readonly weightBytes: number;
  /** Bytes of slices that were read to build it. */
  readonly bytesRead: number;
  readonly #device: OrtDevice;

  private constructor(device: OrtDevice, parts: Omit<DeviceShard, 'release' | 'config' | 'plan'>) {
    this.#device = device;
    this.shape = parts.shape;
    this.embedding = parts.embedding;
    this.layers = parts.layers;
    this.norm = parts.norm;
    this.head = parts.head;
    this.weightBytes = parts.weightBytes;
    this.bytesRead = parts.bytesRead;
  }

  get config(): LlamaConfig {
    return this.shape.config;
  }

  get plan(): RankPlan {
    return this.shape.plan;
  }

  /**
   * Reads this rank's slices and puts them on the device, a matrix at a time: the host holds no more than one.
   *
   * @param source is closed at the end.
   * @throws CaravanError `invalid_checkpoint`, `out_of_memory`, or `cancelled` when the source's signal aborts.
   */
  static async load(
    device: OrtDevice,
    shape: DeviceShape,
    forms: WeightForms,
    source: MatrixSource,
  ): Promise<DeviceShard> {
    const { config, plan } = shape;
    const loading = new Loading(device, shape, source);
    try {
      const slices = slicesOf(config, plan);
      const { embedding, tiedHead } = await loading.vocabulary(slices);
      const layers: DeviceLayer[] = [];
      for (const layer of slices.layers) {
        layers.push(await loading.layer(layer, forms.variants[0]!));
      }
      const norm = await loading.vector(slices.norm);
      const head =
        tiedHead ?? (await loading.matrix({ form: forms.head, isInputsFirst: false }, slices.head));
      const bytes = weightBytes(config, plan, forms);
      return new DeviceShard(device, {
        ...{ shape, embedding, layers, norm, head },
        ...{ weightBytes: bytes, bytesRead: source.bytesRead },
      });
    } catch (error) {
      device.release(...loading.tensors);
      throw error;
    } finally {
      source.close();
      device.endUploads();
    }
  }

  release(): void {
    for (const { attentionNorm, ffnNorm, qkv, o, gate, up, down } of this.layers) {
      this.#device.release(attentionNorm, ffnNorm);
      for (const { tensors } of [qkv, o, gate, up, down]) this.#device.release(...tensors.values());
    }
    this.#device.release(this.norm, ...this.head.tensors.values(), this.embedding);
  }
}

/** 16 bits for activations where weights have them; CUDA's attention has no more anyway. */
export function deviceShape(
  kind: DeviceKind,
  provider: Provider,
  config: LlamaConfig,
  plan: RankPlan,
  forms: WeightForms,
): DeviceShape {
  const activations = forms.head.kind === 'fp16' ? float16 : float32;
  return {
    config,
    plan,
    activations,
    attention: kind === 'cuda' ? float16 : activations,
    isInputsFirst: kind === 'cuda',
    lengthStep: kind === 'cuda' ? CAPTURED_LENGTHS : 1,
    hasFusedProducts: provider.hasFusedProducts,
  };
}

/** What has been put on the device so far. */
class Loading {
  readonly tensors: DeviceTensor[] = [];
  readonly #device: OrtDevice;
  readonly #activations: ElementType;
  readonly #isInputsFirst: boolean;
  readonly #source: MatrixSource;

  constructor(
    device: OrtDevice,
    { activations, isInputsFirst }: DeviceShape,
    source: MatrixSource,
  ) {
    this.#device = device;
    this.#activations = activations;
    this.#isInputsFirst = isInputsFirst;
    this.#source = source;
  }

  /** The embedding's table, and the head if it has the same weights: they are read once, and lie in one place. */
  async vocabulary({
    embedding: slice,
    head,
  }: RankSlices): Promise<{ embedding: DeviceTensor; tiedHead: DeviceMatrix | null }> {
    const { count } = slice.rows;
    const width = slice.columns.count;
    const [read] = await this.#source.matrix([{ kind: 'fp32' }], slice);
    const values = read!.values as Float32Array;
    const type = this.#activations;
    const embedding = this.#keep(this.#device.uploadPadded(values, [count + 1, width], type));
    this.#source.giveBack(read!);
    if (head !== slice) return { embedding, tiedHead: null };
    const weight = this.#keep(this.#device.view(embedding, [count, width]));
    const form: WeightForm = { kind: type === float16 ? 'fp16' : 'fp32' };
    const tensors = new Map([['weight', weight]] as const);
    const tiedHead = { form, outputs: count, inputs: width, isInputsFirst: false, tensors };
    return { embedding, tiedHead };
  }

  async layer(
    slices: LayerSlices,
    forms: Readonly<Record<'qkv' | 'o' | 'gateUp' | 'down', WeightForm>>,
  ): Promise<DeviceLayer> {
    const isInputsFirst = this.#isInputsFirst;
    const matrix = (form: WeightForm, ...parts: TensorSlice[]) =>
      this.matrix({ form, isInputsFirst }, ...parts);
    return {
      attentionNorm: await this.vector(slices.attentionNorm),
      qkv: await matrix(forms.qkv, slices.q, slices.k, slices.v),
      o: await matrix(forms.o, slices.o),
      ffnNorm: await this.vector(slices.ffnNorm),
      gate: await matrix(forms.gateUp, slices.gate),
      up: await matrix(forms.gateUp, slices.up),
      down: await matrix(forms.down, slices.down),
    };
  }

  async vector(slice: TensorSlice): Promise<DeviceTensor> {
    const values = await this.#source.vector(slice);
    return this.#keep(this.#device.upload(values, [values.length], this.#activations));
  }

  async matrix(
    how: Pick<MatrixShape, 'form' | 'isInputsFirst'>,
    ...parts: TensorSlice[]
  ): Promise<DeviceMatrix> {
    const [linear] = await this.#source.matrix([how.form], ...parts);
    const matrix = this.put(how, linear!);
    this.#source.giveBack(linear!);
    return matrix;
  }

  put(
    { form, isInputsFirst }: Pick<MatrixShape, 'form' | 'isInputsFirst'>,
    linear: Linear,
  ): DeviceMatrix {
    const { outputs, inputs } = linear;
    const tensors = new Map<'weight' | 'scales' | 'zeros', DeviceTensor>();
    const upload = this.#device.upload.bind(this.#device);
    if (linear.kind === 'int4') {
      const blocks = inputs / linear.block;
      const shape = [outputs, blocks, linear.block / 2];
      tensors.set('weight', this.#keep(upload(linear.values, shape)));
      const { scales, zeros } = linear;
      tensors.set('scales', this.#keep(upload(scales, [outputs * blocks], this.#activations)));
      tensors.set('zeros', this.#keep(upload(zeros, [zeros.length])));
    } else {
      // Devices have no 8-bit weights.
      const values = linear.values as Float32Array;
      const weight = isInputsFirst
        ? this.#device.uploadTransposed(values, [outputs, inputs], this.#activations)
        : upload(values, [outputs, inputs], this.#activations);
      tensors.set('weight', this.#keep(weight));
    }
    return { form, outputs, inputs, isInputsFirst, tensors };
  }

  #keep(tensor: DeviceTensor): DeviceTensor {
    this.tensors.push(tensor);
    return tensor;
  }
}
