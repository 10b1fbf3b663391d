// SPDX-License-Identifier: Apache-2.0

package cloud

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"text/tabwriter"
)

// Explainer is implemented by providers that choose among types. Explain does what
// Plan does, and tells why; after an error the choice holds what was found out so
// far.
type Explainer interface {
	Explain(ctx context.Context, size Size) (Choice, error)
}

// Choice is what Catalog.Choose came to, and why.
type Choice struct {
	Size        Size // as it was asked for
	OverheadMiB int  // the catalog's
	Type        InstanceType
	// Alternatives are the other types that would do, in the order in which to try
	// them when there is no capacity for Type.
	Alternatives []InstanceType
	// Considered are all types of the catalog: the one taken, the alternatives in
	// their order, then the others in the catalog's.
	Considered []Verdict
	Remark     string // the catalog's
}

// Verdict is what became of one type.
type Verdict struct {
	Type    InstanceType
	Outcome Outcome
	Reason  string // for a person; never empty
}

// Outcome tells what became of a type.
type Outcome int

const (
	OutcomeUnfit       Outcome = iota // it does not do; the reason says what is in its way
	OutcomeAlternative                // it is tried when those before it cannot be had
	OutcomeTaken                      // it is the choice
)

func (o Outcome) String() string {
	switch o {
	case OutcomeAlternative:
		return "alternative"
	case OutcomeTaken:
		return "taken"
	}
	return "no"
}

// Plan is the choice as Provider.Plan gives it.
func (c Choice) Plan(image string) Plan {
	p := Plan{Type: c.Type.Name, VCPUs: c.Type.VCPUs, MemoryMiB: c.Type.MemoryMiB, GPUs: c.Type.GPUs, Image: image}
	for _, t := range c.Alternatives {
		p.Alternatives = append(p.Alternatives, t.Name)
	}
	return p
}

// take writes down the choice before what is noted of the types that do not fit.
// Types with GPUs stand in for one without only when GPUs are wanted.
func (c *Choice) take(t InstanceType, why string, others []InstanceType, gpus bool) {
	c.Type = t
	head := []Verdict{{Type: t, Outcome: OutcomeTaken, Reason: why}}
	var left []Verdict
	for _, o := range others {
		if o.GPUs > 0 && t.GPUs == 0 && !gpus {
			left = append(left, Verdict{Type: o, Reason: "it has GPUs, for which nobody asked"})
			continue
		}
		c.Alternatives = append(c.Alternatives, o)
		head = append(head, Verdict{Type: o, Outcome: OutcomeAlternative, Reason: fmt.Sprintf("fits, tried as number %d", len(c.Alternatives)+1)})
	}
	c.Considered = append(append(head, left...), c.Considered...)
}

// Ask says in words what was asked for, the guest's own part included.
func (c Choice) Ask() string {
	s := c.Size.Ask()
	if c.Size.GPUs == 0 && c.Size.GPUModel != "" {
		s += fmt.Sprintf(" (GPU model %s, but no number of GPUs, so none)", c.Size.GPUModel)
	}
	return s
}

// String is the choice in one line, for a log.
func (c Choice) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "asked for %s: ", c.Ask())
	if c.Type.Name == "" {
		b.WriteString("no type")
	}
	part := OutcomeTaken
	for i, v := range c.Considered {
		switch {
		case v.Outcome == OutcomeTaken:
			fmt.Fprintf(&b, "%s%s, %s", v.Type, perHour(v.Type), v.Reason)
			continue
		case v.Outcome != part || i == 0:
			b.WriteString(map[Outcome]string{OutcomeAlternative: "; then ", OutcomeUnfit: "; not "}[v.Outcome])
		default:
			b.WriteString(", ")
		}
		part = v.Outcome
		b.WriteString(v.Type.Name)
		if v.Outcome == OutcomeUnfit {
			b.WriteString(" (" + v.Reason + ")")
		}
	}
	if c.Remark != "" {
		b.WriteString("; " + c.Remark)
	}
	return b.String()
}

// LogValue is String: one attribute of a record, whatever the handler.
func (c Choice) LogValue() slog.Value { return slog.StringValue(c.String()) }

// Table is the choice as a table, a line to a type, each with its reason.
func (c Choice) Table() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "TYPE\tVCPUS\tMIB\tGPUS\tUSD/HOUR\tCHOICE\tREASON")
	for _, v := range c.Considered {
		t, gpus, price := v.Type, "-", "?"
		if t.GPUs > 0 {
			gpus = strings.TrimSuffix(strconv.Itoa(t.GPUs)+" "+t.GPUModel, " ")
		}
		if t.PricePerHour > 0 {
			price = dollars(t.PricePerHour)
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\t%s\t%s\n", t.Name, t.VCPUs, t.MemoryMiB, gpus, price, v.Outcome, v.Reason)
	}
	w.Flush()
	if c.Remark != "" {
		b.WriteString(c.Remark + "\n")
	}
	return b.String()
}

func perHour(t InstanceType) string {
	if t.PricePerHour == 0 {
		return ""
	}
	return " at $" + dollars(t.PricePerHour) + " per hour"
}

// dollars has as many digits as price lists do.
func dollars(p float64) string { return strconv.FormatFloat(p, 'f', 4, 64) }
