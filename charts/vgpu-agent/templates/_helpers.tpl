{{/* Names. 59 characters leave room for "-mps"; validate.yaml looks at those with a pool's name. */}}
{{- define "vgpu-agent.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 59 | trimSuffix "-" }}
{{- end }}

{{- define "vgpu-agent.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name }}
{{- if not (contains $name .Release.Name) }}{{ $name = printf "%s-%s" .Release.Name $name }}{{ else }}{{ $name = .Release.Name }}{{ end }}
{{- .Values.fullnameOverride | default $name | trunc 59 | trimSuffix "-" }}
{{- end }}

{{/* A DaemonSet's name, from (dict "root" "pool" "component"). */}}
{{- define "vgpu-agent.workload" -}}
{{- $parts := list (include "vgpu-agent.fullname" .root) }}
{{- if eq .component "mps" }}{{ $parts = append $parts "mps" }}{{ end }}
{{- if .pool.name }}{{ $parts = append $parts .pool.name }}{{ end }}
{{- join "-" $parts }}
{{- end }}

{{- define "vgpu-agent.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "vgpu-agent.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "vgpu-agent.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{/* Labels of every object, and those of them that never change: DaemonSets are found by these. */}}
{{- define "vgpu-agent.labels" -}}
{{ include "vgpu-agent.ours" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "vgpu-agent.ours" -}}
app.kubernetes.io/name: {{ include "vgpu-agent.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* What a workload's pods are selected by, from (dict "root" "pool" "component"). */}}
{{- define "vgpu-agent.selector" -}}
{{ include "vgpu-agent.ours" .root }}
app.kubernetes.io/component: {{ .component }}
vgpu-agent/pool: {{ .pool.name | quote }}
{{- end }}

{{/* The pools with their own values over the common ones: JSON of {pools: [...]}. */}}
{{- define "vgpu-agent.pools" -}}
{{- $pools := list }}
{{- range .Values.pools | default (list dict) }}
{{- $common := set (deepCopy (omit $.Values "pools")) "name" "" }}
{{- $pools = append $pools (mergeOverwrite $common .) }}
{{- end }}
{{- dict "pools" $pools | toJson }}
{{- end }}

{{/* The environment of every container of a pool: the driver's variables, then every setting that
has a value. Both workloads have the same, so that the agent and MPS agree. */}}
{{- define "vgpu-agent.env" -}}
{{- $settings := include "vgpu-agent.settings" . | fromJson }}
{{- $address := printf (ternary "[%s]:%d" "%s:%d" (contains ":" .metrics.address)) .metrics.address (int .metrics.port) }}
{{- $settings = set $settings "VGPU_METRICS_ADDRESS" $address }}
{{- if ne .gpuDriver "simulated" -}}
# The NVIDIA runtime puts the driver's libraries and programs into a container that asks for GPUs.
- name: NVIDIA_VISIBLE_DEVICES
  value: {{ ternary "/var/run/nvidia-container-devices" "all" (eq .deviceList "volume-mounts") }}
- name: NVIDIA_DRIVER_CAPABILITIES
  value: compute,utility
{{ end -}}
# What page, log and commands name.
{{- range $name, $field := dict "NODE_NAME" "spec.nodeName" "POD_NAME" "metadata.name" "POD_NAMESPACE" "metadata.namespace" }}
- name: VGPU_{{ $name }}
  valueFrom:
    fieldRef:
      fieldPath: {{ $field }}
{{- end }}
{{- range $name, $value := $settings }}
{{- if not (has (toJson $value) (list "null" "\"\"" "[]" "{}")) }}
- name: {{ $name }}
  value: {{ include "vgpu-agent.text" $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* A value as the agent reads it: on/off, 5, text, 79,13, {"0":4}. Numbers never as 1e+06. */}}
{{- define "vgpu-agent.text" -}}
{{- if kindIs "bool" . }}{{ ternary "on" "off" . }}
{{- else if kindIs "string" . }}{{ . }}
{{- else if kindIs "slice" . }}{{ toJson . | trimAll "[]" | replace "\"" "" }}
{{- else }}{{ toJson . }}
{{- end }}
{{- end }}

{{/* Directories of the host, each at its own path in the container: the mounts and the volumes of a
list of (dict "name" "path"), with "type" DirectoryOrCreate and "at" the same path unless it says
otherwise. */}}
{{- define "vgpu-agent.mounts" -}}
{{- range . }}
- name: {{ .name }}
  mountPath: {{ .at | default .path }}
{{- if .readOnly }}
  readOnly: true
{{- end }}
{{- end }}
{{- end }}

{{- define "vgpu-agent.volumes" -}}
{{- range . }}
- name: {{ .name }}
  hostPath:
    path: {{ .path }}
    type: {{ .type | default "DirectoryOrCreate" }}
{{- end }}
{{- end }}

{{/* Where the driver is asked for by a mount instead of a variable: JSON of a list of mounts. */}}
{{- define "vgpu-agent.gpus" -}}
{{- if and (eq .gpuDriver "nvml") (eq .deviceList "volume-mounts") }}
{{- list (dict "name" "gpus" "path" "/dev/null" "type" "CharDevice" "at" "/var/run/nvidia-container-devices/all") | toJson }}
{{- else }}[]{{ end }}
{{- end }}

{{/* Where the pods of a pool may run: lines of a pod's spec. */}}
{{- define "vgpu-agent.where" -}}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A pod's metadata, from (dict "root" "pool" "component"). */}}
{{- define "vgpu-agent.podMetadata" -}}
labels:
  {{- include "vgpu-agent.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  vgpu-agent/pool: {{ .pool.name | quote }}
{{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Requests equal to limits. */}}
{{- define "vgpu-agent.guaranteed" -}}
requests:
  {{- toYaml .limits | nindent 2 }}
limits:
  {{- toYaml .limits | nindent 2 }}
{{- end }}
