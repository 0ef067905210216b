{{- /* Written from helm/shared by `make schema` into every chart; change it there. */ -}}

{{- /* Name with which every object of the release begins. */ -}}
{{- define "slipway.fullname" -}}
{{- $name := default .Release.Name .Values.fullnameOverride | replace "." "-" -}}
{{- if gt (len $name) 40 -}}
{{- fail (printf "release name %q has %d characters; names of objects are made from it, and 40 are the most. Take a shorter one, or set fullnameOverride." $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" $name) -}}
{{- fail (printf "release name %q does not begin with a letter, as the names of Services and RayJobs must. Take another, or set fullnameOverride." $name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- /* What tells a component's pods from all others: dict "root" $ "component" "x" ["instance" "y"]. Not the name: KubeRay's Services
       select Ray's heads by a name of its own. */ -}}
{{- define "slipway.selector" -}}
app.kubernetes.io/part-of: slipway
app.kubernetes.io/instance: {{ default .root.Release.Name .instance | quote }}
app.kubernetes.io/component: {{ .component | quote }}
{{- end -}}

{{- /* Labels of an object, and of a pod: as above, and "ray" true in the template of a pod of Ray. */ -}}
{{- define "slipway.labels" -}}
{{ include "slipway.selector" . }}
{{- if not .ray }}
app.kubernetes.io/name: {{ printf "slipway-%s" (default .root.Chart.Name .root.Values.nameOverride) | quote }}
{{- end }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ default .root.Release.Service .root.Values.managedBy | quote }}
slipway.dev/deployment: {{ include "slipway.deployment" .root | quote }}
{{- with .root.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "slipway.deployment" -}}
{{- default .Release.Name .Values.deployment -}}
{{- end -}}

{{- /* An image's reference: dict "root" $ "image" .Values.image. */ -}}
{{- define "slipway.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{- define "slipway.serviceAccountName" -}}
{{- default (ternary (include "slipway.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{- /* Restricted Pod Security, of a pod; never a value. */ -}}
{{- define "slipway.podSecurity" -}}
runAsNonRoot: true
{{- if .Values.security.setIds }}
runAsUser: {{ int64 .Values.security.runAsUser }}
runAsGroup: {{ int64 .Values.security.runAsGroup }}
fsGroup: {{ int64 .Values.security.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- /* Restricted Pod Security, of a container; never a value. */ -}}
{{- define "slipway.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- end -}}

{{- /* What every pod's spec begins with: dict "root" $ "pod" .Values.x. */ -}}
{{- define "slipway.pod" -}}
securityContext:
  {{- include "slipway.podSecurity" .root | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range uniq . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
enableServiceLinks: false
{{- with .pod }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
{{- range . }}
{{- $isExists := eq (default "Equal" .operator) "Exists" }}
{{- if and $isExists .value }}{{ fail (printf "a toleration has the value %q beside the operator Exists, which asks for none" .value) }}{{ end }}
{{- if not (or $isExists .key) }}{{ fail "a toleration has no key, which is for the operator Exists alone" }}{{ end }}
{{- if and (hasKey . "tolerationSeconds") (ne (default "" .effect) "NoExecute") }}{{ fail "a toleration has tolerationSeconds, which is for the effect NoExecute alone" }}{{ end }}
{{- end }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* The values' own environment variables, as Kubernetes writes them. */ -}}
{{- define "slipway.env" -}}
{{- $names := list }}
{{- range .Values.env }}
{{- if has .name $names }}{{ fail (printf "env %s is given twice: give it once" .name) }}{{ end }}
{{- $names = append $names .name }}
{{- if eq (kindIs "string" .value) (kindIs "map" .secret) }}{{ fail (printf "env %s: give `value` or `secret`, one of them" .name) }}{{ end }}
- name: {{ .name | quote }}
  {{- if .secret }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret.name | quote }}
      key: {{ .secret.key | quote }}
  {{- else }}
  value: {{ .value | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* Where artifacts and figures go, for programs of ours; needs the values `store` and `tracking`. */ -}}
{{- define "slipway.addresses" -}}
- name: SLIPWAY_HOME
  value: /var/lib/slipway
- name: HOME
  value: /tmp
{{- with .Values.store.url }}
- name: SLIPWAY_STORE
  value: {{ . | quote }}
{{- end }}
{{- with .Values.tracking.uri }}
- name: MLFLOW_TRACKING_URI
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* Their secrets, by reference. */ -}}
{{- define "slipway.addressSecrets" -}}
{{- range compact (list .Values.store.existingSecret .Values.tracking.existingSecret) | uniq }}
- secretRef:
    name: {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* Mounts of a store that is a volume, and of the values' own volumes. */ -}}
{{- define "slipway.mounts" -}}
{{- $isFile := hasPrefix "file:///" .Values.store.url -}}
{{- if and .Values.store.existingClaim (not $isFile) -}}
{{- fail (printf "store.existingClaim is mounted at the path of a file:// URL, and store.url is %q: write file:///PATH there, or leave the claim out" .Values.store.url) -}}
{{- end -}}
{{- if and (hasPrefix "file:" .Values.store.url) (not .Values.store.existingClaim) -}}
{{- fail (printf "store.url %q is a path of each pod's own: name a volume that all share in store.existingClaim" .Values.store.url) -}}
{{- end -}}
{{- if .Values.store.existingClaim }}
- name: store
  mountPath: {{ trimPrefix "file://" .Values.store.url | quote }}
{{- end }}
{{- range $index, $volume := .Values.volumes }}
- name: volume-{{ $index }}
  mountPath: {{ .path | quote }}
  readOnly: {{ .readOnly | default (not (hasKey . "readOnly")) }}
{{- end }}
{{- end -}}

{{- define "slipway.volumes" -}}
{{- if .Values.store.existingClaim }}
- name: store
  persistentVolumeClaim:
    claimName: {{ .Values.store.existingClaim | quote }}
{{- end }}
{{- range $index, $volume := .Values.volumes }}
- name: volume-{{ $index }}
  persistentVolumeClaim:
    claimName: {{ .existingClaim | quote }}
{{- end }}
{{- end -}}

{{- /* Ways out of a NetworkPolicy, where the values name any: theirs, DNS, and the deployment's own pods. */ -}}
{{- define "slipway.egress" -}}
{{- with .Values.networkPolicy.egress }}
egress:
  - to:
      - namespaceSelector: {}
        podSelector:
          matchLabels:
            k8s-app: kube-dns
    ports:
      - port: 53
        protocol: UDP
      - port: 53
        protocol: TCP
  - to:
      - podSelector:
          matchLabels:
            slipway.dev/deployment: {{ include "slipway.deployment" $ | quote }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* Ingress to a Service: dict "root" $ "component" "x" "service" NAME "port" NUMBER. */ -}}
{{- define "slipway.ingress" -}}
{{- with .root.Values.ingress }}
{{- if .enabled }}
{{- if not .host }}{{ fail "ingress.enabled needs ingress.host, the name that clients use" }}{{ end }}
{{- if not (or .tlsSecret .allowPlainHttp) }}{{ fail "ingress.tlsSecret is empty: name a Secret of type kubernetes.io/tls, or set ingress.allowPlainHttp" }}{{ end }}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {{ $.service | quote }}
  labels:
    {{- include "slipway.labels" $ | nindent 4 }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with .className }}
  ingressClassName: {{ . | quote }}
  {{- end }}
  {{- if .tlsSecret }}
  tls:
    - hosts: [{{ .host | quote }}]
      secretName: {{ .tlsSecret | quote }}
  {{- end }}
  rules:
    - host: {{ .host | quote }}
      http:
        paths:
          - path: /
            pathType: Prefix
            backend:
              service:
                name: {{ $.service | quote }}
                port:
                  number: {{ int64 $.port }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* HTTPRoute to a Service, with the same arguments, and optionally "timeout" "600s" of a request. */ -}}
{{- define "slipway.route" -}}
{{- with .root.Values.route }}
{{- if .enabled }}
{{- if not ($.root.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1") }}{{ fail "route.enabled, and this cluster has no gateway.networking.k8s.io/v1: install the Gateway API, or use ingress" }}{{ end }}
{{- if not .parentRefs }}{{ fail "route.enabled needs route.parentRefs, the Gateways that take it" }}{{ end }}
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: {{ $.service | quote }}
  labels:
    {{- include "slipway.labels" $ | nindent 4 }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  parentRefs:
    {{- range .parentRefs }}
    - group: gateway.networking.k8s.io
      kind: Gateway
      name: {{ .name | quote }}
      {{- with .namespace }}
      namespace: {{ . | quote }}
      {{- end }}
      {{- with .sectionName }}
      sectionName: {{ . | quote }}
      {{- end }}
    {{- end }}
  {{- with .hostnames }}
  hostnames:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  rules:
    - backendRefs:
        - group: ""
          kind: Service
          name: {{ $.service | quote }}
          port: {{ int64 $.port }}
      matches:
        - path:
            type: PathPrefix
            value: /
      {{- with $.timeout }}
      timeouts:
        request: {{ . }}
      {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Volume with a word to Kubernetes, which one container of a pod mounts, as what runs in the others gets none. */ -}}
{{- define "slipway.kubernetesToken" -}}
- name: kubernetes-token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          expirationSeconds: 3600
          path: token
      - configMap:
          name: kube-root-ca.crt
          items:
            - key: ca.crt
              path: ca.crt
      - downwardAPI:
          items:
            - path: namespace
              fieldRef:
                fieldPath: metadata.namespace
{{- end -}}

{{- define "slipway.kubernetesTokenMount" -}}
- name: kubernetes-token
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end -}}

{{- /* A quantity as text: whole and fractional numbers are ones too, and KubeRay's kinds take no fraction as a number. */ -}}
{{- define "slipway.quantity" -}}
{{- . | toJson | trimAll "\"" | quote -}}
{{- end -}}

{{- /* Resources of a container. Every quantity is text: where a kind takes whole numbers or text, as KubeRay's do, half a core is none. */ -}}
{{- define "slipway.resources" -}}
{{- range $kind := list "requests" "limits" }}
{{- with index ($ | default dict) $kind }}
{{ $kind }}:
  {{- range $name, $quantity := . }}
  {{ $name | quote }}: {{ include "slipway.quantity" $quantity }}
  {{- end }}
{{- end }}
{{- end }}
{{- end -}}
