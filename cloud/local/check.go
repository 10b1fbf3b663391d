// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/cloud"
)

// Check implements cloud.Provider: is what a VM needs on this node? It starts
// nothing; see Accel for the test boot.
func (p *Provider) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	_, qemuErr := p.findQEMU()
	errs := []error{qemuErr}
	for _, f := range [][2]string{{"LOCAL_KERNEL", p.cfg.Kernel}, {"LOCAL_INITRD", p.cfg.Initrd}} {
		if err := readable(f[1]); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w; build the image with `make podvm-image` or set another path: %w", f[0], err, errdefs.ErrInvalidArgument))
		}
	}
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		errs = append(errs, fmt.Errorf("%w; load it with `modprobe tun`: %w", err, errdefs.ErrFailedPrecondition))
	} else {
		errs = append(errs, tun.Close())
	}
	if p.cfg.Accel == AccelKVM {
		kvm, err := os.OpenFile(p.kvm, os.O_RDWR, 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("LOCAL_ACCEL is %s, but: %w; leave it out to fall back to emulation: %w", AccelKVM, err, errdefs.ErrFailedPrecondition))
		} else {
			errs = append(errs, kvm.Close())
		}
	}
	errs = append(errs, checkNetAdmin(), p.checkStateDir())
	limits, err := readLimits("/", runtime.NumCPU())
	if err != nil {
		errs = append(errs, fmt.Errorf("limits of this node: %w", err))
	} else {
		errs = append(errs, limits.fits(cloud.Plan{VCPUs: p.cfg.DefaultVCPUs, MemoryMiB: p.cfg.DefaultMemoryMiB}))
	}
	return errors.Join(errs...)
}

func readable(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file", path)
	}
	return err
}

// checkStateDir looks for write access to the directory, or to the closest one
// above it that exists.
func (p *Provider) checkStateDir() error {
	dir := p.cfg.StateDir
	for {
		err := unix.Access(dir, unix.W_OK|unix.X_OK)
		if errors.Is(err, fs.ErrNotExist) && dir != "/" {
			dir = filepath.Dir(dir)
			continue
		}
		if err != nil {
			return fmt.Errorf("LOCAL_DIR %s cannot be written (%s: %w); run as root or set another: %w", p.cfg.StateDir, dir, err, errdefs.ErrFailedPrecondition)
		}
		return nil
	}
}

const capNetAdmin = 12 // CAP_NET_ADMIN, linux/capability.h

func checkNetAdmin() error {
	b, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return err
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if hex, found := strings.CutPrefix(line, "CapEff:"); found {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				return err
			}
			if caps&(1<<capNetAdmin) == 0 {
				return fmt.Errorf("making a bridge needs CAP_NET_ADMIN; run as root: %w", errdefs.ErrFailedPrecondition)
			}
		}
	}
	return nil
}
