{{/* dict root, at: what every Pod of ours has, from values.gateway, values.redis or an engine */}}
{{- define "caravan.podBasics" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .at.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .at.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .at.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* dict selector, spread, perRevision: keys, whenUnsatisfiable */}}
{{- define "caravan.topologySpread" -}}
{{- if .spread.keys }}
topologySpreadConstraints:
  {{- range .spread.keys }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: {{ $.spread.whenUnsatisfiable }}
    labelSelector:
      matchLabels: {{- $.selector | nindent 8 }}
    {{- if $.perRevision }}
    # Old and new Pods of a rollout are spread each for themselves.
    matchLabelKeys: [pod-template-hash]
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* dict root: where gateways and coordinators find Redis */}}
{{- define "caravan.redisEnvironment" -}}
{{- $redis := .root.Values.redis }}
{{- if and $redis.enabled (or $redis.external.url $redis.external.urlSecret.name) }}
{{- fail "redis: either enabled, or external.url or external.urlSecret; not both" }}
{{- end }}
{{- if $redis.enabled }}
{{- $host := printf "%s-redis:6379" (include "caravan.name" .root) }}
{{- if $redis.passwordSecret.name }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {{- toYaml $redis.passwordSecret | nindent 6 }}
- name: CARAVAN_REDIS
  value: redis://:$(REDIS_PASSWORD)@{{ $host }}
{{- else }}
- name: CARAVAN_REDIS
  value: redis://{{ $host }}
{{- end }}
{{- else if $redis.external.urlSecret.name }}
- name: CARAVAN_REDIS
  valueFrom:
    secretKeyRef: {{- toYaml $redis.external.urlSecret | nindent 6 }}
{{- else if $redis.external.url }}
- name: CARAVAN_REDIS
  value: {{ $redis.external.url | quote }}
{{- else }}
{{- fail "redis: with enabled false, external.url or external.urlSecret.name must say where Redis is" }}
{{- end }}
{{- end }}

{{/* dict root: files that the URL of an external Redis names */}}
{{- define "caravan.redisVolumes" -}}
{{- with .root.Values.redis.external.mountSecret }}
- name: redis
  secret:
    secretName: {{ . }}
    defaultMode: 288 # 0440
{{- end }}
{{- end }}

{{- define "caravan.redisMounts" -}}
{{- if .root.Values.redis.external.mountSecret }}
- name: redis
  mountPath: /etc/caravan/redis
  readOnly: true
{{- end }}
{{- end }}

{{/* dict root: certificates of our own links */}}
{{- define "caravan.tlsVolume" -}}
{{- with .root.Values.mtls.secretName }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 288 # 0440
{{- end }}
{{- end }}

{{- define "caravan.tlsMount" -}}
{{- if .root.Values.mtls.secretName }}
- name: tls
  mountPath: /etc/caravan/tls
  readOnly: true
{{- end }}
{{- end }}

{{/* dict root, dials: whether the process calls others */}}
{{- define "caravan.tlsArgs" -}}
{{- if .root.Values.mtls.secretName }}
- --tls-cert=/etc/caravan/tls/tls.crt
- --tls-key=/etc/caravan/tls/tls.key
- --tls-ca=/etc/caravan/tls/ca.crt
{{- if .dials }}
- --tls-server-name={{ .root.Values.mtls.serverName }}
{{- end }}
{{- end }}
{{- end }}
