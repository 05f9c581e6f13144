{{/* Text, also of the number or switch that `--set` and YAML make of 7 and true. Never 1e+06. */}}
{{- define "vgpu-agent.string" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{/* The first of a list that is there, as such text: a name may be 0. */}}
{{- define "vgpu-agent.first" -}}
{{- $found := "" }}
{{- range . }}
{{- if not (or $found (kindIs "invalid" .)) }}{{ $found = include "vgpu-agent.string" . }}{{ end }}
{{- end }}
{{- $found }}
{{- end }}

{{/* JSON of {is: ...}: what it is given, with text for each number and switch but for those that Kubernetes
counts with, and without nulls. */}}
{{- define "vgpu-agent.texts" -}}
{{- $is := . }}
{{- if kindIs "map" . }}
{{- $is = dict }}
{{- range $key, $value := . }}
{{- if has $key (list "tolerationSeconds" "weight") }}{{ $_ := set $is $key $value }}
{{- else if not (kindIs "invalid" $value) }}{{ $_ := set $is $key (include "vgpu-agent.texts" $value | fromJson).is }}
{{- end }}
{{- end }}
{{- else if kindIs "slice" . }}
{{- $is = list }}
{{- range . }}{{ $is = append $is (include "vgpu-agent.texts" . | fromJson).is }}{{ end }}
{{- else }}{{ $is = include "vgpu-agent.string" . }}
{{- end }}
{{- dict "is" $is | toJson }}
{{- end }}

{{/* The same as YAML. */}}
{{- define "vgpu-agent.yaml" -}}
{{- (include "vgpu-agent.texts" . | fromJson).is | toYaml }}
{{- end }}

{{/* YAML of a map whose values are all text, without those that are null. */}}
{{- define "vgpu-agent.strings" -}}
{{- $all := dict }}
{{- range $key, $value := (include "vgpu-agent.over" (list .) | fromJson) }}
{{- $all = set $all $key (include "vgpu-agent.string" $value) }}
{{- end }}
{{- toYaml $all }}
{{- end }}

{{/* JSON of maps over each other, from a list of them: later ones win, and null takes a key away. */}}
{{- define "vgpu-agent.over" -}}
{{- $all := dict }}
{{- range . }}
{{- range $key, $value := . }}
{{- if kindIs "map" $value }}
{{- $under := ternary (get $all $key) dict (kindIs "map" (get $all $key)) }}
{{- $_ := set $all $key (include "vgpu-agent.over" (list $under $value) | fromJson) }}
{{- else if kindIs "invalid" $value }}{{ $_ := unset $all $key }}
{{- else }}{{ $_ := set $all $key $value }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $all }}
{{- end }}

{{/* Names. 59 characters leave room for "-mps"; validate.yaml looks at those with a pool's name. */}}
{{- define "vgpu-agent.name" -}}
{{- include "vgpu-agent.first" (list .Values.nameOverride .Chart.Name) | trunc 59 | trimSuffix "-" }}
{{- end }}

{{- define "vgpu-agent.fullname" -}}
{{- $name := include "vgpu-agent.name" . }}
{{- /* A Service's name has no dots, and a release's may. */}}
{{- $release := replace "." "-" .Release.Name }}
{{- if not (contains $name $release) }}{{ $name = printf "%s-%s" $release $name }}{{ else }}{{ $name = $release }}{{ end }}
{{- include "vgpu-agent.first" (list .Values.fullnameOverride $name) | trunc 59 | trimSuffix "-" }}
{{- end }}

{{/* A DaemonSet's name, from (dict "root" "pool" "component"). */}}
{{- define "vgpu-agent.workload" -}}
{{- $parts := list (include "vgpu-agent.fullname" .root) }}
{{- if eq .component "mps" }}{{ $parts = append $parts "mps" }}{{ end }}
{{- if .pool.name }}{{ $parts = append $parts .pool.name }}{{ end }}
{{- join "-" $parts }}
{{- end }}

{{- define "vgpu-agent.serviceAccountName" -}}
{{- $account := .Values.serviceAccount | default dict }}
{{- $own := ternary (include "vgpu-agent.fullname" .) "default" ($account.create | default false) }}
{{- include "vgpu-agent.first" (list $account.name $own) }}
{{- end }}

{{- define "vgpu-agent.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ include "vgpu-agent.first" (list .tag $.Chart.AppVersion) }}{{ end }}
{{- end }}
{{- end }}

{{/* The labels that things are found by, and that never change: from (dict "root" "component"
"pool"), the latter two where it has them. */}}
{{- define "vgpu-agent.selector" -}}
app.kubernetes.io/name: {{ include "vgpu-agent.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .pool }}
vgpu-agent/pool: {{ .name | quote }}
{{- end }}
{{- end }}

{{/* Labels of an object, from the same and "also", a map. Those of the chart win: things are found by
them. */}}
{{- define "vgpu-agent.labels" -}}
{{- $chart := printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- $about := dict "app.kubernetes.io/version" .root.Chart.AppVersion "app.kubernetes.io/managed-by" .root.Release.Service "helm.sh/chart" $chart }}
{{- $ours := include "vgpu-agent.selector" . | fromYaml }}
{{- include "vgpu-agent.over" (list .root.Values.commonLabels .also $about $ours) | fromJson | include "vgpu-agent.strings" }}
{{- end }}

{{/* The pools with their own values over the common ones, and what every template may count on: JSON
of {pools: [...]}. A null takes the default away; where a setting is needed, the agent's holds. */}}
{{- define "vgpu-agent.pools" -}}
{{- $pools := list }}
{{- $base := include "vgpu-agent.defaults" . | fromJson }}
{{- $base = set $base "resources" (dict "agent" dict "limits" dict "prepare" dict "daemon" dict "watch" dict "restore" dict) }}
{{- $base = set (set $base "updateStrategy" dict) "nodeSelector" dict }}
{{- range .Values.pools | default (list dict) }}
{{- $own := include "vgpu-agent.over" (list (omit $.Values "pools") .) | fromJson }}
{{- $pool := include "vgpu-agent.over" (list $base $own) | fromJson }}
{{- $pools = append $pools (set $pool "name" (include "vgpu-agent.string" (get . "name"))) }}
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
{{- range .extraEnv }}
- name: {{ .name | quote }}
{{- with .valueFrom }}
  valueFrom:
    {{- toYaml . | nindent 4 }}
{{- else }}
  value: {{ include "vgpu-agent.string" (get . "value") | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* A value as the agent reads it: on/off, 5, text, 79,13, {"0":4}. Numbers never as 1e+06. */}}
{{- define "vgpu-agent.text" -}}
{{- if kindIs "bool" . }}{{ ternary "on" "off" . }}
{{- else if kindIs "slice" . }}{{ toJson . | trimAll "[]" | replace "\"" "" }}
{{- else }}{{ include "vgpu-agent.string" . }}
{{- end }}
{{- end }}

{{/* Directories of the host, each at its own path in the container: the mounts and the volumes of a
list of (dict "name" "path"), with "type" DirectoryOrCreate and "at" the same path unless it says
otherwise. From a list of the pool, whose own come after them, and that list. */}}
{{- define "vgpu-agent.mounts" -}}
{{- range last . }}
- name: {{ .name }}
  mountPath: {{ .at | default .path }}
{{- if .readOnly }}
  readOnly: true
{{- end }}
{{- end }}
{{- $pool := first . }}
{{- $taken := list }}
{{- range last . }}{{ $taken = append $taken (.at | default .path) }}{{ end }}
{{- range $pool.extraVolumeMounts }}
{{- if has .mountPath $taken }}
{{- fail (printf "\n\nextraVolumeMounts: mountPath %s%s is there already, by the chart or by another one: any other path is allowed\n" .mountPath (include "vgpu-agent.inPool" $pool)) }}
{{- end }}
{{- $taken = append $taken .mountPath }}
{{ list . | toYaml }}
{{- end }}
{{- end }}

{{- define "vgpu-agent.volumes" -}}
{{- range last . }}
- name: {{ .name }}
  hostPath:
    path: {{ .path }}
    type: {{ .type | default "DirectoryOrCreate" }}
{{- end }}
{{- $pool := first . }}
{{- $taken := list }}
{{- range last . }}{{ $taken = append $taken .name }}{{ end }}
{{- range $pool.extraVolumes }}
{{- if has .name $taken }}
{{- fail (printf "\n\nextraVolumes: name %s%s is there already, by the chart or by another one: any other name is allowed\n" .name (include "vgpu-agent.inPool" $pool)) }}
{{- end }}
{{- $taken = append $taken .name }}
{{ list . | toYaml }}
{{- end }}
{{- end }}

{{/* Where a value is that is refused. */}}
{{- define "vgpu-agent.inPool" -}}
{{- with .name }}{{ printf " in pool %q" . }}{{ end }}
{{- end }}

{{/* Where the driver is asked for by a mount instead of a variable: JSON of a list of mounts. */}}
{{- define "vgpu-agent.gpus" -}}
{{- if and (eq .gpuDriver "nvml") (eq .deviceList "volume-mounts") }}
{{- list (dict "name" "gpus" "path" "/dev/null" "type" "CharDevice" "at" "/var/run/nvidia-container-devices/all") | toJson }}
{{- else }}[]{{ end }}
{{- end }}

{{/* What a user says of the pods of a pool, above all where they may run: lines of a pod's spec. */}}
{{- define "vgpu-agent.where" -}}
{{- with .podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with include "vgpu-agent.first" (list .runtimeClassName) }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with include "vgpu-agent.first" (list .priorityClassName) }}
priorityClassName: {{ . | quote }}
{{- end }}
nodeSelector:
  {{- include "vgpu-agent.over" (list .nodeSelector (dict "kubernetes.io/os" "linux")) | fromJson | include "vgpu-agent.strings" | nindent 2 }}
{{- with .affinity }}
affinity:
  {{- include "vgpu-agent.yaml" . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- include "vgpu-agent.yaml" . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A pod's metadata, from (dict "root" "pool" "component"). */}}
{{- define "vgpu-agent.podMetadata" -}}
labels:
  {{- include "vgpu-agent.labels" (dict "root" .root "component" .component "pool" .pool "also" .root.Values.podLabels) | nindent 2 }}
{{- with .root.Values.podAnnotations }}
annotations:
  {{- include "vgpu-agent.strings" . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A container's resources, from its requests and limits, where it has them. */}}
{{- define "vgpu-agent.resources" -}}
{{- if or .requests .limits }}
{{- range $kind, $quantities := . }}
{{- with $quantities }}
{{ $kind }}:
  {{- include "vgpu-agent.strings" . | nindent 2 }}
{{- end }}
{{- end }}
{{- else }}{}
{{- end }}
{{- end }}

{{/* Requests equal to limits. */}}
{{- define "vgpu-agent.guaranteed" -}}
{{- include "vgpu-agent.resources" (dict "requests" .limits "limits" .limits) }}
{{- end }}
