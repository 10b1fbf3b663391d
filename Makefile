# SPDX-License-Identifier: Apache-2.0
#
# make demo         run a pod in its own virtual machine on this machine, and check all of it;
#                   PROVIDER=aws or azure: through that cloud's provider, on an emulation of the cloud
# make test         every test: unit, kernel, end to end
# make critest      Kubernetes' test suite for container runtimes, on containerd 1.6 and 2, against runc;
#                   writes docs/compatibility.md
# make e2e-k8s      Kubernetes' own tests on a real cluster, every pod in its own virtual machine
# make bench        measure; writes docs/performance.md's figures to the terminal
# make cross-check  the emulations of clouds, asked by the vendors' other clients (needs node, npm and PyPI)
# make build        the binaries, into _output/bin
# make podvm-image  the pod VM's kernel, initramfs and disk images, into _output/podvm;
#                   ARCH=arm64: for another architecture, into _output/podvm-arm64
# make generate     the Go code of the protocols
#
# Everything is built under _output and can be removed with it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

GO      ?= go
OUT     := $(CURDIR)/_output
BIN     := $(OUT)/bin
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
MODULE  := github.com/kata-remote/kata-remote
KEEP    ?=
PROVIDER ?=

export GOFLAGS := $(GOFLAGS) -trimpath
export PATH := $(BIN):$(PATH)

# The guest's program links libcontainer, whose first instructions are C and run
# before Go's: it needs cgo, and must not need a libc in the guest.
PODVMD_FLAGS := -tags netgo,osusergo,seccomp -ldflags '$(LDFLAGS) -extldflags -static'
# Whose registries the pod VM trusts: by default those this machine trusts.
AUTHORITIES ?= /etc/ssl/certs/ca-certificates.crt
# go test builds the same code; seccomp needs the C library.
TEST_TAGS := seccomp

.PHONY: cross-check all demo demo-stop test critest e2e-k8s e2e-k8s-stop bench build setup podvm-image generate verify clean

all: build podvm-image

setup:
	@test/setup.sh

build: setup
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -ldflags '$(LDFLAGS)' -o $(BIN)/ ./shim/cmd/... ./caa/cmd/...
	@ln -sf containerd-shim-kata-v2 $(BIN)/containerd-shim-kata-remote-v2

# The image of another architecture than this machine's is cross-built: its C library
# comes with the cross compiler, and its libseccomp is fetched like the kernel.
NATIVE := $(shell dpkg --print-architecture)
ARCH   ?= $(NATIVE)
PODVM  := $(OUT)/podvm$(if $(filter-out $(NATIVE),$(ARCH)),-$(ARCH))
TRIPLE := $(patsubst arm64,aarch64,$(patsubst amd64,x86_64,$(ARCH)))-linux-gnu
# SIGN_KEY=key.pem SIGN_CERT=cert.pem sign the disk images for UEFI Secure Boot.
# CONSOLE=ttyS0 lets them speak on a serial console.
PODVM_IMAGE_FLAGS = $(addprefix -authorities ,$(wildcard $(AUTHORITIES))) \
	$(if $(SIGN_KEY)$(SIGN_CERT),-sign-key '$(SIGN_KEY)' -sign-cert '$(SIGN_CERT)') $(addprefix -console ,$(CONSOLE))

ifeq ($(ARCH),$(NATIVE))
podvm-image: setup
	@mkdir -p $(BIN)
	CGO_ENABLED=1 $(GO) build $(PODVMD_FLAGS) -o $(BIN)/podvmd ./podvm/cmd/podvmd
	@kernel=$$(podvm/image/fetch.sh) && stub=$$(podvm/image/fetch.sh stub) && \
	$(GO) run ./podvm/cmd/podvm-image -kernel "$$kernel" -stub "$$stub" -podvmd $(BIN)/podvmd -out $(PODVM) $(PODVM_IMAGE_FLAGS) \
		$$(dpkg-query -W -f '-component $${Package}=$${Version}:$${Architecture} ' libseccomp-dev libc6-dev)
else
podvm-image: setup
	@test/setup.sh gcc-$(subst _,-,$(TRIPLE)) libc6-dev-$(ARCH)-cross
	@mkdir -p $(PODVM)
	@lib=$$(podvm/image/fetch.sh seccomp $(ARCH)) && kernel=$$(podvm/image/fetch.sh kernel $(ARCH)) && stub=$$(podvm/image/fetch.sh stub $(ARCH)) && \
	CGO_ENABLED=1 GOARCH=$(ARCH) CC=$(TRIPLE)-gcc PKG_CONFIG_LIBDIR="$$lib/usr/lib/$(TRIPLE)/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$$lib" \
	$(GO) build $(PODVMD_FLAGS) -o $(PODVM)/podvmd ./podvm/cmd/podvmd && \
	$(GO) run ./podvm/cmd/podvm-image -kernel "$$kernel" -stub "$$stub" -podvmd $(PODVM)/podvmd -out $(PODVM) $(PODVM_IMAGE_FLAGS) \
		$$(sed 's/^\(.*\) \(.*\) \(.*\)$$/-component \1=\2:\3/' "$$lib/.package") \
		$$(dpkg-query -W -f '-component $${Package}=$${Version}:$${Architecture} ' libc6-dev-$(ARCH)-cross)
endif

# crictl is another project's program with another set of dependencies: a module of
# its own. Go's build cache makes the second time quick.
$(BIN)/crictl: test/tools/cri/go.mod test/tools/cri/go.sum
	@mkdir -p $(BIN)
	@echo "building crictl (about a minute the first time)" >&2
	@cd test/tools/cri && CGO_ENABLED=0 $(GO) build -ldflags '-s -w' -o $@ github.com/kubernetes-sigs/cri-tools/cmd/crictl
	@touch $@

# critest, and the ginkgo of the version it is built with: that runs its specs side by
# side, and takes a program for a test by the end of its name.
CRITEST := $(OUT)/critest-tools
$(CRITEST)/critest.test: test/tools/cri/go.mod test/tools/cri/go.sum test/tools/cri/tools.go
	@mkdir -p $(@D)
	@echo "building critest (about two minutes the first time)" >&2
	@cd test/tools/cri && CGO_ENABLED=0 $(GO) build -ldflags '-s -w' -o $(@D)/ginkgo github.com/onsi/ginkgo/v2/ginkgo && \
		CGO_ENABLED=0 $(GO) test -c -ldflags '-s -w' -o $@ github.com/kubernetes-sigs/cri-tools/cmd/critest
	@touch $@

# The generations of containerd that Debian 12 does not have.
CONTAINERD_TAGS := no_btrfs,no_zfs,no_devmapper,no_aufs
$(OUT)/containerd2/containerd: CONTAINERD := github.com/containerd/containerd/v2
$(OUT)/containerd17/containerd: CONTAINERD := github.com/containerd/containerd
$(OUT)/containerd2/containerd $(OUT)/containerd17/containerd: $(OUT)/%/containerd: test/tools/%/go.mod test/tools/%/go.sum
	@mkdir -p $(@D)
	@echo "building $* (about a minute the first time)" >&2
	@cd test/tools/$* && CGO_ENABLED=0 $(GO) build -tags $(CONTAINERD_TAGS) -ldflags '-s -w' -o $(@D)/ \
		$(CONTAINERD)/cmd/containerd $(CONTAINERD)/cmd/containerd-shim-runc-v2 $(CONTAINERD)/cmd/ctr
	@touch $@

# Kubernetes: its servers with etcd and kubectl in one program, the program of its test
# images, its own test suite and what runs the suite in several processes. The version
# is go.mod's. What is linked into a program with -X is what a release's build says.
KUBE_VERSION = $(shell cd test/tools/kube && $(GO) list -m -f "{{.Version}}" k8s.io/kubernetes)
KUBE_STAMPS  = $(foreach p,k8s.io/component-base/version k8s.io/client-go/pkg/version, \
	-X $(p).gitVersion=$(KUBE_VERSION) -X $(p).gitTreeState=clean -X $(p).gitCommit=$(KUBE_VERSION) \
	-X $(p).gitMajor=$(word 1,$(subst ., ,$(KUBE_VERSION:v%=%))) -X $(p).gitMinor=$(word 2,$(subst ., ,$(KUBE_VERSION))) \
	-X $(p).buildDate=1970-01-01T00:00:00Z)
$(OUT)/kube/e2e.test: $(wildcard test/tools/kube/go.* test/tools/kube/*.go test/tools/kube/kube-all/*.go)
	@mkdir -p $(@D)
	@echo "building Kubernetes $(KUBE_VERSION) and its test suite (5 to 15 minutes on two cores the first time)" >&2
	@cd test/tools/kube && export CGO_ENABLED=0 && \
	$(GO) build -ldflags '-s -w $(KUBE_STAMPS)' -o $(@D)/ ./kube-all && \
	$(GO) build -ldflags '-s -w' -o $(@D)/ k8s.io/kubernetes/test/images/agnhost github.com/onsi/ginkgo/v2/ginkgo && \
	install -m 644 "$$($(GO) list -m -f '{{.Dir}}' k8s.io/kubernetes)"/test/images/agnhost/porter/localhost.* $(@D)/ && \
	ln -sf kube-all $(@D)/kubectl && \
	$(GO) test -c -ldflags '-s -w $(KUBE_STAMPS)' -o $@ k8s.io/kubernetes/test/e2e
	@touch $@

demo: build podvm-image $(BIN)/crictl
	@$(GO) build -o $(BIN)/demo ./test/demo
	@$(BIN)/demo -bin $(BIN) -podvm $(OUT)/podvm -out $(OUT)/demo -provider '$(PROVIDER)' $(if $(KEEP),-keep)

demo-stop:
	@$(BIN)/demo -out $(OUT)/demo -stop

# -p 2: two packages at a time; the kernel tests and the virtual machines of more
# would starve each other on two cores.
test: build podvm-image verify $(BIN)/crictl $(OUT)/containerd17/containerd $(OUT)/containerd2/containerd
	@$(GO) build -o $(BIN)/tally ./test/tally
	@$(GO) vet -tags $(TEST_TAGS) ./...
	@export PEERPOD_BIN=$(BIN) PEERPOD_PODVM=$(OUT)/podvm; \
	test="$(GO) test -tags $(TEST_TAGS) -race -timeout 30m -json"; \
	$$test -p 2 ./... | $(BIN)/tally -name test -again "$$test"

# FOCUS='regular expression' runs some of the specs only.
critest: build podvm-image $(BIN)/crictl $(CRITEST)/critest.test $(OUT)/containerd2/containerd
	@CGO_ENABLED=0 $(GO) build -ldflags '-s -w' -o $(CRITEST)/ ./test/critest/image/...
	@$(GO) build -o $(BIN)/critest ./test/critest
	@$(BIN)/critest -bin $(BIN) -podvm $(OUT)/podvm -tools $(CRITEST) -out $(OUT)/critest \
		-page docs/compatibility.md $(if $(FOCUS),-focus '$(FOCUS)')

# A whole run takes about twenty-five minutes on two processors; FOCUS='...' runs only the
# tests of Kubernetes' suite whose names match, CONTAINERD=1.6 on another containerd,
# SLOW=1 what Kubernetes calls slow, too; KEEP=1 leaves the cluster running.
e2e-k8s: build podvm-image $(BIN)/crictl $(OUT)/containerd2/containerd $(OUT)/kube/e2e.test $(if $(filter 1.7,$(CONTAINERD)),$(OUT)/containerd17/containerd)
	@$(GO) build -o $(BIN)/e2e-k8s ./test/kube
	@$(BIN)/e2e-k8s -bin $(BIN) -podvm $(OUT)/podvm -kube $(OUT)/kube -out $(OUT)/e2e-k8s -page docs/compatibility.md \
		$(if $(CONTAINERD),-containerd $(CONTAINERD)) $(if $(FOCUS),-focus '$(FOCUS)') $(if $(SLOW),-slow) $(if $(KEEP),-keep)

e2e-k8s-stop:
	@$(BIN)/e2e-k8s -out $(OUT)/e2e-k8s -stop

bench: build podvm-image $(BIN)/crictl
	@$(GO) build -o $(BIN)/ ./test/bench ./test/simadaptor
	@$(BIN)/bench -bin $(BIN) -podvm $(OUT)/podvm -out $(OUT)/bench
	@$(GO) test -run '^$$' -bench . ./agent-protocol/relay ./caa/agentproxy

# The emulations were written with the vendors' Go clients; these are others: from npm
# and PyPI at the versions that test/crosscheck names, and Debian's awscli. moto is
# somebody else's emulation, to compare replies with.
CROSSCHECK := $(OUT)/cross-check
$(CROSSCHECK)/aws/node_modules $(CROSSCHECK)/azure/node_modules: $(CROSSCHECK)/%/node_modules: test/crosscheck/%/package.json
	@mkdir -p $(@D) && cp $< $(@D)/
	@cd $(@D) && npm install --no-audit --no-fund --no-package-lock --loglevel=error
	@touch $@

$(CROSSCHECK)/aws/moto/bin/moto_server: test/crosscheck/aws/requirements.txt
	@test/setup.sh awscli python3-venv
	@echo "installing moto (one to two minutes)" >&2
	@/usr/bin/python3 -m venv $(CROSSCHECK)/aws/moto && $(CROSSCHECK)/aws/moto/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

cross-check: $(CROSSCHECK)/aws/node_modules $(CROSSCHECK)/azure/node_modules $(CROSSCHECK)/aws/moto/bin/moto_server
	@$(GO) build -o $(BIN)/tally ./test/tally
	@CROSSCHECK_AWS=$(CROSSCHECK)/aws CROSSCHECK_AZURE=$(CROSSCHECK)/azure $(GO) test -tags crosscheck -count=1 -p 1 -json ./test/crosscheck/... | \
		$(BIN)/tally -name cross-check

generate: setup
	@mkdir -p $(BIN)
	@GOBIN=$(BIN) $(GO) install tool
	@protoc -I . --go_out=. --go_opt=module=$(MODULE) --go-ttrpc_out=. --go-ttrpc_opt=module=$(MODULE) agent-protocol/proto/*.proto caa/adminpb/*.proto shim/sandboxpb/*.proto

# The committed code is what the definitions make, and go.mod is tidy.
verify: generate
	@if ! git diff --quiet -- '*.pb.go'; then \
		git diff --stat -- '*.pb.go'; \
		echo 'verify: the generated code differs from the definitions: commit what `make generate` made' >&2; exit 1; fi
	@$(GO) mod tidy -diff >/dev/null || { echo 'verify: go.mod is not tidy: run go mod tidy' >&2; exit 1; }

clean:
	rm -rf $(OUT)
