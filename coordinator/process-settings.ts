/** Settings of processes that others watch, end and replace: on Kubernetes, or under systemd. */
import { z } from 'zod';
import { defaulted, fromText, onOff, onOffRule, optional, text, whole } from './setting.js';

const seconds = z.preprocess(fromText, z.number().gt(0).max(31_536_000));
const secondsRule = 'a number of seconds above 0 and up to 31536000';

export const processSettings = {
  metricsPort: optional({
    argument: '<port>',
    description:
      'port of an engine for /metrics, /livez, /readyz and /startupz; 0 takes a free one (default: none)',
    rule: 'a whole number from 0 to 65535',
    schema: whole(0, 65_535),
  }),
  drainTimeout: optional({
    argument: '<seconds>',
    description:
      'how long SIGTERM lets what runs go on before it is left to others (default: to its end)',
    rule: secondsRule,
    schema: seconds,
  }),
  stallTimeout: defaulted(120, {
    argument: '<seconds>',
    description:
      '/livez fails when a step or the loading of weights has not moved on for this long',
    rule: secondsRule,
    schema: seconds,
  }),
  tlsCert: optional({
    argument: '<file>',
    description:
      'PEM certificate of this process, for mutual TLS on all gRPC links (default: plain)',
    rule: 'a file',
    schema: text,
  }),
  tlsKey: optional({
    argument: '<file>',
    description: 'PEM key of --tls-cert',
    rule: 'a file',
    schema: text,
  }),
  tlsCa: optional({
    argument: '<file>',
    description: 'PEM certificate of the authority that every peer must have its own from',
    rule: 'a file',
    schema: text,
  }),
  tlsServerName: optional({
    argument: '<name>',
    description: 'name that certificates of peers must have (default: the address that is dialled)',
    rule: 'a host name',
    schema: z.string().regex(/^[\w.-]{1,253}$/),
  }),
  httpsCert: optional({
    argument: '<file>',
    description: 'PEM certificate of the HTTP front, with those between (default: plain HTTP)',
    rule: 'a file',
    schema: text,
  }),
  httpsKey: optional({
    argument: '<file>',
    description: 'PEM key of --https-cert',
    rule: 'a file',
    schema: text,
  }),
  ranksTimeout: defaulted(60, {
    argument: '<seconds>',
    description: 'how long ranks may take to come up before the first group serves',
    rule: secondsRule,
    schema: seconds,
  }),
  ordinal: optional({
    argument: '<n>',
    description:
      "number of the engine's Pod in a StatefulSet or LeaderWorkerSet: low ones take new jobs first",
    rule: 'a whole number from 0 to 1000000',
    schema: whole(0, 1_000_000),
  }),
  podDeletionCost: defaulted(false, {
    argument: null,
    description:
      "keep the deletion cost of the engine's own Pod up to date, so that idle ones go first",
    rule: onOffRule,
    schema: onOff,
  }),
} as const;
