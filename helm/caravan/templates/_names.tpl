{{/* Short enough that names of groups, and of their Pods, fit into 63 characters. */}}
{{- define "caravan.name" -}}
{{- default .Release.Name .Values.nameOverride | trunc 24 | trimSuffix "-" }}
{{- end }}

{{/* dict root, component, and model of engines */}}
{{- define "caravan.selector" -}}
app.kubernetes.io/name: caravan
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
caravan/model: {{ . }}
{{- end }}
{{- end }}

{{/* Labels of Pods: those of a chart's version would restart engines that did not change. */}}
{{- define "caravan.podLabels" -}}
{{ include "caravan.selector" . }}
app.kubernetes.io/part-of: caravan
{{- with .root.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* dict root, component, and model of engines */}}
{{- define "caravan.labels" -}}
{{ include "caravan.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: caravan
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* dict root, image: repository, tag or digest, pullPolicy */}}
{{- define "caravan.imageOf" -}}
{{- $name := printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) }}
{{- if .image.digest }}
{{- $name = printf "%s@%s" .image.repository .image.digest }}
{{- end -}}
image: {{ $name }}
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}

{{/* dict into, from: sets what `from` has, maps within maps; false, 0 and '' count, unlike in Sprig's merges. */}}
{{- define "caravan.mergeInto" -}}
{{- range $key, $value := .from }}
{{- if and (kindIs "map" $value) (kindIs "map" (index $.into $key)) }}
{{- include "caravan.mergeInto" (dict "into" (index $.into $key) "from" $value) }}
{{- else }}
{{- $_ := set $.into $key $value }}
{{- end }}
{{- end }}
{{- end }}

{{/* `list`: every model with what it leaves out, in YAML. Says what is wrong with one. */}}
{{- define "caravan.engines" -}}
{{- $engines := list }}
{{- $names := dict }}
{{- range $model := .Values.models }}
{{- $engine := deepCopy $.Values.engine }}
{{- include "caravan.mergeInto" (dict "into" $engine "from" $model) }}
{{- include "caravan.checkEngine" (dict "engine" $engine "names" $names) }}
{{- $_ := set $names $engine.name true }}
{{- $_ := set $engine "fullName" (printf "%s-engine-%s" (include "caravan.name" $) $engine.name) }}
{{- $_ := set $engine "servedName" (default $engine.name $engine.servedModelName) }}
{{- $_ := set $engine "isSpread" (or (gt (int $engine.nodes) 1) (eq $engine.workload "LeaderWorkerSet")) }}
{{- $_ := set $engine "ranksPerNode" (div (int $engine.tp) (int $engine.nodes)) }}
{{- $engines = append $engines $engine }}
{{- end }}
{{- toYaml (dict "list" $engines) }}
{{- end }}

{{- define "caravan.checkEngine" -}}
{{- $engine := .engine }}
{{- $where := printf "models: %s" $engine.name }}
{{- if hasKey .names $engine.name }}
{{- fail (printf "%s: two models have this name" $where) }}
{{- end }}
{{- if mod (int $engine.tp) (int $engine.nodes) }}
{{- fail (printf "%s: tp %d cannot be spread evenly over %d nodes" $where (int $engine.tp) (int $engine.nodes)) }}
{{- end }}
{{- if and $engine.gpuDirect (ne $engine.device "cuda") }}
{{- fail (printf "%s: gpuDirect needs device cuda" $where) }}
{{- end }}
{{- if and $engine.exact (ne $engine.device "cpu") }}
{{- fail (printf "%s: only cpu can be exact" $where) }}
{{- end }}
{{- $modes := ternary (list "auto" "fp32" "int8" "int4" "int4+int8") (list "auto" "fp32" "fp16" "int8" "int4") (eq $engine.device "cpu") }}
{{- if not (has $engine.weights $modes) }}
{{- fail (printf "%s: weights %s is not for %s: take one of %s" $where $engine.weights $engine.device (join ", " $modes)) }}
{{- end }}
{{- if and (eq $engine.kv "int8") (or $engine.exact (ne $engine.device "cpu")) }}
{{- fail (printf "%s: kv int8 is for cpu, and cannot be exact" $where) }}
{{- end }}
{{- if and $engine.exact (eq $engine.weights "int4+int8") }}
{{- fail (printf "%s: weights int4+int8 chooses by the number of rows and cannot be exact" $where) }}
{{- end }}
{{- if and (eq $engine.transport "direct") (or (not $engine.gpuDirect) (gt (int $engine.nodes) 1)) }}
{{- fail (printf "%s: transport direct needs gpuDirect, and one node" $where) }}
{{- end }}
{{- if and (gt (int $engine.nodes) 1) (eq $engine.transport "shm") }}
{{- fail (printf "%s: transport shm cannot reach other nodes" $where) }}
{{- end }}
{{- if and (gt (int $engine.nodes) 1) (eq $engine.workload "StatefulSet") }}
{{- fail (printf "%s: a group of %d nodes is a LeaderWorkerSet, not a StatefulSet" $where (int $engine.nodes)) }}
{{- end }}
{{- $source := $engine.source }}
{{- if and (eq $source.kind "claim") (not $source.claim.name) }}
{{- fail (printf "%s: source.claim.name must name a PersistentVolumeClaim" $where) }}
{{- end }}
{{- if and (eq $source.kind "pull") (not $source.pull.model) }}
{{- fail (printf "%s: source.pull.model must be hf:ORG/NAME" $where) }}
{{- end }}
{{- if and (eq $source.kind "image") (not $source.image.reference) }}
{{- fail (printf "%s: source.image.reference must name an image" $where) }}
{{- end }}
{{- if and (eq $engine.weightCache.kind "claim") (not $engine.weightCache.claimName) }}
{{- fail (printf "%s: weightCache.claimName must name a PersistentVolumeClaim" $where) }}
{{- end }}
{{- if gt (int $engine.autoscaling.minReplicas) (int $engine.autoscaling.maxReplicas) }}
{{- fail (printf "%s: autoscaling.minReplicas is above maxReplicas" $where) }}
{{- end }}
{{- end }}
