{{/* dict root, engine: where the checkpoint lies in the containers that read it */}}
{{- define "caravan.modelPath" -}}
{{- $source := .engine.source }}
{{- if eq $source.kind "embedded" -}}
caravan-tiny
{{- else if eq $source.kind "pull" -}}
/models/{{ $source.pull.model | trimPrefix "hf:" | replace "/" "--" }}
{{- else if eq $source.kind "claim" -}}
{{ printf "/models/%s" $source.claim.path | trimSuffix "/" }}
{{- else -}}
{{ printf "/models/%s" $source.image.path | trimSuffix "/" }}
{{- end }}
{{- end }}

{{- define "caravan.engineImage" -}}
{{- $image := ternary .root.Values.cudaImage .root.Values.image (eq .engine.device "cuda") }}
{{- include "caravan.imageOf" (dict "root" .root "image" $image) }}
{{- end }}

{{- define "caravan.engineVolumes" -}}
{{- $source := .engine.source }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .engine.shmSize }}
{{- if eq .engine.weightCache.kind "claim" }}
- name: weights
  persistentVolumeClaim:
    claimName: {{ .engine.weightCache.claimName }}
{{- else if eq .engine.weightCache.kind "node" }}
- name: weights
  hostPath:
    path: {{ .engine.weightCache.path }}
    type: Directory
{{- end }}
{{- if include "caravan.keepsDeletionCost" . }}
# For the coordinator alone: the other containers have nothing to say to Kubernetes.
- name: service-account
  projected:
    sources:
      - serviceAccountToken: { path: token, expirationSeconds: 3600 }
      - configMap:
          name: kube-root-ca.crt
          items: [{ key: ca.crt, path: ca.crt }]
      - downwardAPI:
          items:
            - path: namespace
              fieldRef: { fieldPath: metadata.namespace }
{{- end }}
{{- if eq $source.kind "claim" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ $source.claim.name }}
    readOnly: true
{{- else if eq $source.kind "image" }}
- name: models
  image:
    reference: {{ $source.image.reference }}
    pullPolicy: {{ $source.image.pullPolicy }}
{{- else if eq $source.kind "pull" }}
{{- $cache := $source.pull.cache }}
- name: models
  {{- if eq $cache.kind "claim" }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" .engine.fullName) $cache.claimName }}
  {{- else if eq $cache.kind "node" }}
  hostPath:
    path: {{ $cache.path }}
    type: Directory
  {{- else }}
  emptyDir:
    sizeLimit: {{ $cache.size }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "caravan.engineMounts" -}}
- name: shm
  mountPath: /dev/shm
{{- include "caravan.tlsMount" . }}
{{- if ne .engine.weightCache.kind "none" }}
- name: weights
  mountPath: /weights
{{- end }}
{{- if ne .engine.source.kind "embedded" }}
- name: models
  mountPath: /models
  readOnly: true
{{- end }}
{{- end }}

{{/* The init container that fetches a model, unless it is all there. */}}
{{- define "caravan.pullContainer" -}}
{{- $pull := .engine.source.pull }}
- name: pull
  {{- include "caravan.engineImage" . | nindent 2 }}
  args:
    - dist/coordinator/cli/main.js
    - pull
    - {{ $pull.model }}
    - --to={{ include "caravan.modelPath" . }}
  {{- if or $pull.endpoint $pull.tokenSecret.name }}
  env:
    {{- with $pull.endpoint }}
    - name: HF_ENDPOINT
      value: {{ . }}
    {{- end }}
    {{- if $pull.tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {{- toYaml $pull.tokenSecret | nindent 10 }}
    {{- end }}
  {{- end }}
  volumeMounts:
    - name: models
      mountPath: /models
  resources: {{- toYaml $pull.resources | nindent 4 }}
  securityContext: {{- toYaml .root.Values.containerSecurityContext | nindent 4 }}
{{- end }}

{{/* Requests and limits of a container that has `gpus` devices. */}}
{{- define "caravan.rankResources" -}}
{{- $resources := deepCopy .engine.rankResources }}
{{- if eq .engine.device "cuda" }}
{{- $limits := default dict $resources.limits }}
{{- $_ := set $limits .engine.gpuResource .gpus }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* dict root, engine, host: the ranks of one node. A container sees only its own device, whose number there is 0;
     with gpuDirect all are in one container, which ends when one of them does, and begins anew. */}}
{{- define "caravan.rankContainers" -}}
{{- $engine := .engine }}
{{- $count := int $engine.ranksPerNode }}
{{- $groups := ternary (list (until $count)) (chunk 1 (until $count)) $engine.gpuDirect }}
{{- range $ports := $groups }}
- name: {{ ternary "ranks" (printf "rank-%d" (first $ports)) $engine.gpuDirect }}
  {{- if $.isSidecar }}
  restartPolicy: Always
  {{- end }}
  {{- include "caravan.engineImage" $ | nindent 2 }}
  {{- if $engine.gpuDirect }}
  command: [tini, --, bash, -c]
  args:
    - |
      trap 'kill $(jobs -p); wait' TERM INT
      for device in {{ join " " $ports }}; do
        node dist/worker/main.js --listen={{ $.host }}:$((7000 + device)) --device=cuda:$device \
          --health-port=$((7100 + device)) "$@" &
      done
      wait -n
      code=$?
      kill $(jobs -p)
      wait
      exit $code
    - ranks
  {{- else }}
  args:
    - dist/worker/main.js
    - --listen={{ $.host }}:{{ add 7000 (first $ports) }}
    - --device={{ ternary "cuda:0" "cpu" (eq $engine.device "cuda") }}
    - --health-port={{ add 7100 (first $ports) }}
    {{- if not $.isOnNetwork }}
    # The kubelet asks from outside; everything else stays within the Pod.
    - --health-host=0.0.0.0
    {{- end }}
  {{- end }}
    - --threads={{ int $engine.threads }}
    - --stall-timeout={{ int $engine.stallSeconds }}
    - --drain-timeout={{ int $engine.terminationGracePeriodSeconds }}
    {{- include "caravan.tlsArgs" (dict "root" $.root "dials" true) | nindent 4 }}
    - --log-level={{ $engine.logLevel }}
    {{- range $engine.rankArgs }}
    - {{ . | quote }}
    {{- end }}
  {{- with $engine.env }}
  env: {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    {{- range $ports }}
    {{- if $.isOnNetwork }}
    - name: rank-{{ . }}
      containerPort: {{ add 7000 . }}
    {{- end }}
    - name: health-{{ . }}
      containerPort: {{ add 7100 . }}
    {{- end }}
  {{- /* Alive is who moves: a step, the loading of weights; or who waits for a coordinator. */}}
  {{- $probe := dict "httpGet" (dict "path" "/livez" "port" (printf "health-%d" (first $ports))) }}
  {{- if $engine.gpuDirect }}
  {{- $probe = dict "exec" (dict "command" (list "node" "-e" (printf "Promise.all([%s].map((port) => fetch(`http://127.0.0.1:${port}/livez`))).then((all) => process.exit(all.every((one) => one.ok) ? 0 : 1), () => process.exit(1))" (include "caravan.healthPorts" $ports)))) }}
  {{- end }}
  startupProbe:
    {{- toYaml $probe | nindent 4 }}
    periodSeconds: 2
    timeoutSeconds: 5
    failureThreshold: 60
  livenessProbe:
    {{- toYaml $probe | nindent 4 }}
    periodSeconds: 15
    timeoutSeconds: 10
    failureThreshold: 3
  volumeMounts: {{- include "caravan.engineMounts" $ | nindent 4 }}
  resources: {{- include "caravan.rankResources" (dict "engine" $engine "gpus" (len $ports)) | nindent 4 }}
  securityContext: {{- toYaml $.root.Values.containerSecurityContext | nindent 4 }}
{{- end }}
{{- end }}

{{- define "caravan.healthPorts" -}}
{{- $ports := list }}
{{- range . }}
{{- $ports = append $ports (add 7100 .) }}
{{- end }}
{{- join ", " $ports }}
{{- end }}

{{/* Addresses of all ranks, in rank order, as the coordinator tells them to everybody. */}}
{{- define "caravan.rankAddresses" -}}
{{- $engine := .engine }}
{{- $addresses := list }}
{{- range $node := until (int $engine.nodes) }}
{{- range $rank := until (int $engine.ranksPerNode) }}
{{- $host := "127.0.0.1" }}
{{- if gt (int $engine.nodes) 1 }}
{{- $pod := ternary (printf "$(POD_NAME)-%d" $node) "$(POD_NAME)" (gt $node 0) }}
{{- $host = printf "%s.%s.%s.svc.%s" $pod $engine.fullName $.root.Release.Namespace $.root.Values.clusterDomain }}
{{- end }}
{{- $addresses = append $addresses (printf "%s:%d" $host (add 7000 $rank)) }}
{{- end }}
{{- end }}
{{- join "," $addresses }}
{{- end }}

{{- define "caravan.coordinatorMounts" -}}
{{- if ne .engine.source.kind "embedded" }}
- name: models
  mountPath: /models
  readOnly: true
{{- end }}
{{- if include "caravan.keepsDeletionCost" . }}
- name: service-account
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end }}
{{ include "caravan.redisMounts" . }}
{{- include "caravan.tlsMount" . }}
{{- end }}

{{- define "caravan.coordinatorContainer" -}}
{{- $engine := .engine }}
- name: coordinator
  {{- include "caravan.engineImage" . | nindent 2 }}
  args:
    - dist/coordinator/cli/main.js
    - coordinator
    - --ranks={{ include "caravan.rankAddresses" . }}
    - --device={{ $engine.device }}
    - --model={{ include "caravan.modelPath" . }}
    - --served-model-name={{ $engine.servedName }}
    - --weights={{ $engine.weights }}
    - --kv={{ $engine.kv }}
    - --transport={{ $engine.transport }}
    - --max-batch-size={{ int $engine.maxBatchSize }}
    {{- with $engine.maxSeqLen }}
    - --max-seq-len={{ int . }}
    {{- end }}
    {{- if $engine.exact }}
    - --exact
    {{- end }}
    - --host=0.0.0.0
    - --metrics-port=9400
    # What runs then is left to the journal, and goes on in another engine.
    - --drain-timeout={{ max 1 (sub $engine.terminationGracePeriodSeconds 10) }}
    - --stall-timeout={{ int $engine.stallSeconds }}
    # Other nodes may still fetch the image, or the model.
    - --ranks-timeout={{ int $engine.startupSeconds }}
    {{- include "caravan.tlsArgs" (dict "root" .root "dials" true) | nindent 4 }}
    {{- if include "caravan.keepsDeletionCost" . }}
    - --pod-deletion-cost
    {{- end }}
    - --log-level={{ $engine.logLevel }}
    {{- range $engine.coordinatorArgs }}
    - {{ . | quote }}
    {{- end }}
  env:
    - name: POD_NAME
      valueFrom:
        fieldRef: { fieldPath: metadata.name }
    - name: POD_NAMESPACE
      valueFrom:
        fieldRef: { fieldPath: metadata.namespace }
    {{- /* Who goes first when engines are to be fewer is the highest ordinal: new work goes to low ones. */}}
    {{- if or $engine.isSpread (eq $engine.workload "StatefulSet") }}
    - name: CARAVAN_ORDINAL
      valueFrom:
        fieldRef:
          fieldPath: metadata.labels['{{ ternary "leaderworkerset.sigs.k8s.io/group-index" "apps.kubernetes.io/pod-index" $engine.isSpread }}']
    {{- end }}
    {{- if ne $engine.weightCache.kind "none" }}
    # As the ranks see it.
    - name: CARAVAN_WEIGHT_CACHE
      value: /weights
    {{- end }}
    {{- include "caravan.redisEnvironment" (dict "root" .root) | nindent 4 }}
    {{- with $engine.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - name: metrics
      containerPort: 9400
  startupProbe:
    # Passes when weights are being read; from then on liveness judges, however long that takes.
    httpGet: { path: /startupz, port: metrics }
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: {{ div (add $engine.startupSeconds 4) 5 }}
  livenessProbe:
    httpGet: { path: /livez, port: metrics }
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 3
  readinessProbe:
    httpGet: { path: /readyz, port: metrics }
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 2
  {{- $mounts := include "caravan.coordinatorMounts" . | trim }}
  {{- with $mounts }}
  volumeMounts: {{- . | nindent 4 }}
  {{- end }}
  resources: {{- toYaml $engine.coordinatorResources | nindent 4 }}
  securityContext: {{- toYaml .root.Values.containerSecurityContext | nindent 4 }}
{{- end }}

{{/* dict root, engine, part: `group` (one Pod), `leader` or `worker` of a group that spans nodes */}}
{{- define "caravan.enginePod" -}}
{{- $engine := .engine }}
{{- $isSpread := gt (int $engine.nodes) 1 }}
{{- $selector := include "caravan.selector" (dict "root" .root "component" "engine" "model" $engine.name) }}
{{- $ranks := dict "root" .root "engine" $engine "host" (ternary "0.0.0.0" "127.0.0.1" $isSpread) "isOnNetwork" $isSpread }}
metadata:
  labels: {{- include "caravan.podLabels" (dict "root" .root "component" "engine" "model" $engine.name) | nindent 4 }}
    caravan/part: {{ .part }}
    {{- if ne .part "worker" }}
    caravan/coordinator: 'true'
    {{- end }}
  {{- with $engine.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "caravan.podBasics" (dict "root" .root "at" $engine) | nindent 2 }}
  {{- if ne .part "worker" }}
  {{- include "caravan.topologySpread" (dict "selector" $selector "spread" $engine.topologySpread "perRevision" (and (not $engine.isSpread) (eq $engine.workload "Deployment"))) | nindent 2 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ int $engine.terminationGracePeriodSeconds }}
  securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 4 }}
  {{- if include "caravan.keepsDeletionCost" . }}
  serviceAccountName: {{ include "caravan.name" .root }}-engine
  {{- end }}
  volumes:
    {{- include "caravan.engineVolumes" . | nindent 4 }}
    {{- include "caravan.tlsVolume" . | nindent 4 }}
    {{- if ne .part "worker" }}
    {{- include "caravan.redisVolumes" . | nindent 4 }}
    {{- end }}
  {{- if or (ne .part "worker") (eq $engine.source.kind "pull") }}
  initContainers:
    {{- if eq $engine.source.kind "pull" }}
    {{- include "caravan.pullContainer" . | nindent 4 }}
    {{- end }}
    {{- if ne .part "worker" }}
    # Sidecars: they start before the coordinator and end after it has drained.
    {{- include "caravan.rankContainers" (merge (dict "isSidecar" true) $ranks) | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    {{- if eq .part "worker" }}
    {{- include "caravan.rankContainers" (merge (dict "isSidecar" false) $ranks) | nindent 4 }}
    {{- else }}
    {{- include "caravan.coordinatorContainer" . | nindent 4 }}
    {{- end }}
{{- end }}
