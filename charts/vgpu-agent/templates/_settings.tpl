{{/* Written from vgpu_agent/settings.py by `python -m tests.readme`: the value of each setting, as JSON,
and the values that are used where there is none. */}}
{{- define "vgpu-agent.defaults" -}}
{
  "metrics": {"address": "::", "port": 9408},
  "gpuDriver": "nvml",
  "sharing": "mps",
  "mps": {
    "maxClients": "auto",
    "limits": "client",
    "computeMode": "exclusive",
    "threads": "share",
    "daemons": "gpu",
    "directory": "/run/vgpu-agent/mps",
    "multiuser": false,
    "shm": true,
    "shmDirectory": "/dev/shm/vgpu-agent"
  },
  "replicasByGpu": {},
  "resourceName": "k8s.amazonaws.com/vgpu",
  "kubeletDir": "/var/lib/kubelet",
  "deviceList": "envvar",
  "cdiKind": "nvidia.com/gpu",
  "memoryReserved": "auto",
  "memoryLimits": "auto",
  "memoryGuarantee": false,
  "memoryLimitsEnableController": false,
  "placement": "spread",
  "health": {
    "interval": 5,
    "recoverySeconds": 60,
    "checks": true,
    "ignoredXids": [],
    "criticalXids": [],
    "driverWait": 300,
    "lostCardSeconds": 3600
  },
  "stateDirectory": "/run/vgpu-agent",
  "cordonDirectory": "/var/lib/vgpu-agent/cordoned",
  "statusHosts": [],
  "statusPage": true,
  "podResourcesInterval": 10,
  "processMetrics": false,
  "log": {"level": "info", "format": "text"},
  "simulated": {
    "gpus": 2,
    "model": "NVIDIA Simulated 24GB",
    "memory": "24Gi",
    "numaNodes": [0, 1]
  }
}
{{- end }}
{{- define "vgpu-agent.settings" -}}
{{- $settings := dict
  "VGPU_CDI_KIND" .cdiKind
  "VGPU_CORDON_DIRECTORY" .cordonDirectory
  "VGPU_CRITICAL_XIDS" .health.criticalXids
  "VGPU_DEVICE_LIST" .deviceList
  "VGPU_DEVICE_MEMORY" .deviceMemory
  "VGPU_DEVICE_PLUGIN_DIR" .devicePluginDir
  "VGPU_DRIVER_WAIT" .health.driverWait
  "VGPU_GPU_DRIVER" .gpuDriver
  "VGPU_HEALTH_CHECKS" .health.checks
  "VGPU_HEALTH_INTERVAL" .health.interval
  "VGPU_IGNORED_XIDS" .health.ignoredXids
  "VGPU_KUBELET_DIR" .kubeletDir
  "VGPU_LOG_FORMAT" .log.format
  "VGPU_LOG_LEVEL" .log.level
  "VGPU_LOST_CARD_SECONDS" .health.lostCardSeconds
  "VGPU_MEMORY_GUARANTEE" .memoryGuarantee
  "VGPU_MEMORY_LIMITS" .memoryLimits
  "VGPU_MEMORY_LIMITS_ENABLE_CONTROLLER" .memoryLimitsEnableController
  "VGPU_MEMORY_RESERVED" .memoryReserved
  "VGPU_PLACEMENT" .placement
  "VGPU_PODRESOURCES_INTERVAL" .podResourcesInterval
  "VGPU_PROCESS_METRICS" .processMetrics
  "VGPU_RECOVERY_SECONDS" .health.recoverySeconds
  "VGPU_REPLICAS" .replicas
  "VGPU_REPLICAS_BY_GPU" .replicasByGpu
  "VGPU_RESOURCE_NAME" .resourceName
  "VGPU_SHARING" .sharing
  "VGPU_STATE_DIRECTORY" .stateDirectory
  "VGPU_STATUS_HOSTS" .statusHosts
  "VGPU_STATUS_PAGE" .statusPage
}}
{{- if eq .sharing "mps" }}{{ $settings = merge $settings (dict
  "VGPU_MPS_COMPUTE_MODE" .mps.computeMode
  "VGPU_MPS_DAEMONS" .mps.daemons
  "VGPU_MPS_DIRECTORY" .mps.directory
  "VGPU_MPS_LIMITS" .mps.limits
  "VGPU_MPS_MAX_CLIENTS" .mps.maxClients
  "VGPU_MPS_MULTIUSER" .mps.multiuser
  "VGPU_MPS_SHM" .mps.shm
  "VGPU_MPS_SHM_DIRECTORY" .mps.shmDirectory
  "VGPU_MPS_THREADS" .mps.threads
) }}{{ end }}
{{- if eq .gpuDriver "simulated" }}{{ $settings = merge $settings (dict
  "VGPU_SIMULATED_GPUS" .simulated.gpus
  "VGPU_SIMULATED_MEMORY" .simulated.memory
  "VGPU_SIMULATED_MODEL" .simulated.model
  "VGPU_SIMULATED_NUMA_NODES" .simulated.numaNodes
) }}{{ end }}
{{- toJson $settings }}
{{- end }}
