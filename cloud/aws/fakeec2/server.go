// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

const (
	ec2Version = "2016-11-15"
	stsVersion = "2011-06-15"
)

// maxBody is the largest request: a block of a snapshot is 512 KiB, and the service
// refuses forms long before.
const maxBody = 4 << 20

// Server is one region of one account: an http.Handler for the endpoints of EC2, of
// STS and of the EBS direct API. It is safe for concurrent use.
type Server struct {
	cfg  Config
	run  context.Context // of everything that goes on beside requests
	stop context.CancelFunc
	wg   sync.WaitGroup // its goroutines

	mu         sync.Mutex
	random     *rand.Rand // guarded by mu, as is everything below
	seq        int
	vpcs       []VPC
	subnets    map[string]*subnet
	groups     map[string]*group
	types      map[string]InstanceType
	images     map[string]*image
	instances  map[string]*instance
	volumes    map[string]*volume
	enis       map[string]*eni
	snapshots  map[string]*snapshot
	spots      map[string]*spotRequest
	templates  map[string]*template
	keys       map[string]*Key
	tokens     map[string]*launchToken
	faults     []*fault
	buckets    map[string]*emulation.Bucket
	capacities []*Capacity
	quotas     map[string]int
	calls      map[string]int
}

// New makes a region. Close it when it has a Host.
func New(cfg Config) *Server {
	cfg.setDefaults()
	s := &Server{
		cfg: cfg, random: newRandom(cfg.Seed), vpcs: cfg.VPCs,
		subnets: map[string]*subnet{}, groups: map[string]*group{}, types: map[string]InstanceType{},
		images: map[string]*image{}, instances: map[string]*instance{}, volumes: map[string]*volume{},
		enis: map[string]*eni{}, snapshots: map[string]*snapshot{}, spots: map[string]*spotRequest{},
		templates: map[string]*template{}, keys: map[string]*Key{}, tokens: map[string]*launchToken{},
		buckets: map[string]*emulation.Bucket{}, quotas: map[string]int{}, calls: map[string]int{},
	}
	s.run, s.stop = context.WithCancel(context.Background())
	for _, n := range cfg.Subnets {
		if n.VPC == "" {
			n.VPC = DefaultVPC
		}
		if !n.Gateway.IsValid() {
			n.Gateway = n.CIDR.Masked().Addr().Next()
		}
		s.subnets[n.ID] = &subnet{Subnet: n, tags: map[string]string{}}
	}
	for _, g := range cfg.SecurityGroups {
		if g.VPC == "" {
			g.VPC = DefaultVPC
		}
		s.groups[g.ID] = &group{SecurityGroup: g, tags: map[string]string{}}
	}
	for _, t := range cfg.Types {
		s.types[t.Name] = t
	}
	for _, k := range cfg.Keys {
		s.keys[k.ID] = &k
	}
	for _, i := range cfg.Images {
		s.addImage(i)
	}
	return s
}

// Close stops all machines and waits for everything that goes on. The Server still
// answers afterwards; its instances are as good as terminated.
func (s *Server) Close() {
	s.stop()
	s.wg.Wait()
}

// Calls tells how often an action was called, refused calls included.
func (s *Server) Calls(action string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[action]
}

// handlers are the actions by name. They run with s.mu held and return the reply.
var handlers = map[string]func(*Server, *call) (obj, error){
	"AuthorizeSecurityGroupIngress":  (*Server).authorizeIngress,
	"RevokeSecurityGroupIngress":     (*Server).revokeIngress,
	"CancelSpotInstanceRequests":     (*Server).cancelSpot,
	"CreateLaunchTemplate":           (*Server).createTemplate,
	"CreateTags":                     (*Server).createTags,
	"DeleteLaunchTemplate":           (*Server).deleteTemplate,
	"DeleteNetworkInterface":         (*Server).deleteENI,
	"DeleteSnapshot":                 (*Server).deleteSnapshot,
	"DeleteTags":                     (*Server).deleteTags,
	"DeleteVolume":                   (*Server).deleteVolume,
	"DeregisterImage":                (*Server).deregisterImage,
	"DescribeAddresses":              (*Server).describeAddresses,
	"DescribeAvailabilityZones":      (*Server).describeZones,
	"DescribeImages":                 (*Server).describeImages,
	"DescribeInstanceAttribute":      (*Server).describeAttribute,
	"DescribeInstanceStatus":         (*Server).describeStatus,
	"DescribeInstanceTypeOfferings":  (*Server).describeOfferings,
	"DescribeInstanceTypes":          (*Server).describeTypes,
	"DescribeInstances":              (*Server).describeInstances,
	"DescribeKeyPairs":               (*Server).describeKeyPairs,
	"DescribeLaunchTemplateVersions": (*Server).describeTemplateVersions,
	"DescribeLaunchTemplates":        (*Server).describeTemplates,
	"DescribeNetworkInterfaces":      (*Server).describeENIs,
	"DescribePlacementGroups":        (*Server).describePlacementGroups,
	"DescribeRegions":                (*Server).describeRegions,
	"DescribeSecurityGroups":         (*Server).describeGroups,
	"DescribeSnapshots":              (*Server).describeSnapshots,
	"DescribeSpotInstanceRequests":   (*Server).describeSpots,
	"DescribeSubnets":                (*Server).describeSubnets,
	"DescribeTags":                   (*Server).describeTags,
	"DescribeVolumes":                (*Server).describeVolumes,
	"DescribeVpcs":                   (*Server).describeVpcs,
	"GetConsoleOutput":               (*Server).consoleOutput,
	"RegisterImage":                  (*Server).registerImage,
	"RunInstances":                   (*Server).runInstances,
	"StartInstances":                 (*Server).startInstances,
	"StopInstances":                  (*Server).stopInstances,
	"TerminateInstances":             (*Server).terminateInstances,
	"GetCallerIdentity":              (*Server).callerIdentity,
	"AssumeRoleWithWebIdentity":      (*Server).assumeRole,
}

// call is one request while it is served.
type call struct {
	*params
	now   time.Time
	key   *Key
	fault Fault
	form  url.Values
}

// answer is what goes back.
type answer struct {
	version, requestID string
	body               []byte // of a success
	err                error
	fault              Fault
}

// ServeHTTP answers POST / as EC2 or STS, by the version in the form, and the paths
// of the EBS direct API.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if err != nil {
		return // the caller left
	}
	if strings.HasPrefix(r.URL.Path, "/snapshots") {
		s.serveEBS(w, r, body)
		return
	}
	a := s.query(r, body)
	if a.fault.Hang {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	if a.fault.Lost {
		panic(http.ErrAbortHandler) // net/http closes the connection
	}
	w.Header().Set("X-Amzn-Requestid", a.requestID)
	if a.err != nil {
		writeError(w, a.version, a.requestID, a.err)
		return
	}
	w.Header().Set("Content-Type", "text/xml;charset=UTF-8")
	write(w, r, a.body, a.fault)
}

// write sends a body, as the fault has it.
func write(w http.ResponseWriter, r *http.Request, body []byte, f Fault) {
	if f.Malformed {
		body = append(body[:len(body)*2/3:len(body)*2/3], "<<>"...)
	}
	if f.Slow <= 0 {
		w.Write(body)
		return
	}
	for i := range body {
		select {
		case <-time.After(f.Slow):
		case <-r.Context().Done():
			return
		}
		w.Write(body[i : i+1])
		if fl, ok := w.(http.Flusher); ok {
			fl.Flush()
		}
	}
}

// query serves one request of the query protocols.
func (s *Server) query(r *http.Request, body []byte) (a answer) {
	s.mu.Lock()
	a.requestID = fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", s.random.Uint32(), s.random.Uint32N(1<<16),
		s.random.Uint32N(1<<12), s.random.Uint32N(1<<12), s.random.Uint64N(1<<48))
	s.mu.Unlock()
	a.version = ec2Version
	if r.URL.Path != "/" && r.URL.Path != "" || r.Method != http.MethodPost {
		a.err = errorf(400, "InvalidRequest", "%s %s is no request of the query API", r.Method, r.URL.Path)
		return a
	}
	form, err := url.ParseQuery(string(body))
	if err != nil || len(body) > maxBody {
		a.err = errorf(400, "MalformedQueryString", "The query string contains a syntax error")
		return a
	}
	sch, action := schemas[form.Get("Version")], form.Get("Action")
	if sch == nil || sch.ops[action].name == "" {
		a.err = errorf(400, "InvalidAction", "The action %s is not valid for this web service", action)
		return a
	}
	a.version = sch.version
	s.mu.Lock()
	s.calls[action]++
	s.mu.Unlock()
	c := &call{form: form, now: s.cfg.Now()}
	if action != "AssumeRoleWithWebIdentity" { // its token is the credential
		if c.key, a.err = s.authenticate(r, body); a.err != nil {
			return a
		}
	}
	var out obj
	out, a.fault, a.err = s.serve(r.Context(), sch, action, c)
	if a.err == nil {
		a.body = sch.render(sch.ops[action], out, a.requestID)
	}
	return a
}

// serve parses and carries out one action.
func (s *Server) serve(ctx context.Context, sch *schema, action string, c *call) (obj, Fault, error) {
	var err error
	if c.params, err = sch.parse(sch.ops[action].in, c.form); err != nil {
		return nil, Fault{}, err
	}
	name := "ec2:" + action
	if sch.version == stsVersion {
		name = "sts:" + action
	}
	// Anybody may ask who they are, whatever their policies say.
	if c.key != nil && action != "GetCallerIdentity" && !c.key.may(name) {
		return nil, Fault{}, s.unauthorized(c.key, name)
	}
	// Who tags what an action makes must be allowed to tag ("Grant permission to tag
	// Amazon EC2 resources during creation", EC2 User Guide).
	if tag := "ec2:CreateTags"; c.key != nil && len(c.all("TagSpecification")) > 0 && !c.key.may(tag) {
		return nil, Fault{}, s.unauthorized(c.key, tag)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if sch.version == ec2Version {
		if err := s.throttled(action, c.params); err != nil {
			return nil, Fault{}, err
		}
	}
	c.fault = s.faultFor(action, c.params)
	if c.fault.Delay > 0 {
		s.mu.Unlock()
		select {
		case <-time.After(c.fault.Delay):
		case <-ctx.Done():
		}
		s.mu.Lock()
	}
	if c.fault.Err != nil {
		return nil, c.fault, c.fault.Err
	}
	c.now = s.cfg.Now()
	s.settle(c.now)
	out, err := handlers[action](s, c)
	return out, c.fault, err
}

// dryRun is the answer of a request that would have succeeded. Handlers ask it when
// everything has been checked.
func (c *call) dryRun() error {
	if c.bool("DryRun") {
		return errorf(412, "DryRunOperation", "Request would have succeeded, but DryRun flag is set.")
	}
	return nil
}

// Transport carries requests to the Server without a network, whatever host they
// name: for tests, also in a testing/synctest bubble, where sockets do not do.
func (s *Server) Transport() http.RoundTripper { return transport{s} }

type transport struct{ h http.Handler }

// RoundTrip returns when the handler has written its first byte, as a client would
// see it; a handler that aborts is a connection that was closed.
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	in := r.Clone(r.Context())
	in.RequestURI = r.URL.RequestURI()
	in.Host = r.Host
	if in.Host == "" {
		in.Host = r.URL.Host
	}
	if r.Body == nil {
		in.Body = http.NoBody
	} else {
		body, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil {
			return nil, err
		}
		in.Body = io.NopCloser(bytes.NewReader(body))
	}
	reader, writer := io.Pipe()
	w := &pipeWriter{header: http.Header{}, body: writer, started: make(chan int, 1)}
	go func() {
		defer func() {
			if recover() != nil {
				writer.CloseWithError(io.ErrUnexpectedEOF)
			} else {
				w.WriteHeader(http.StatusOK)
				writer.Close()
			}
			close(w.started)
		}()
		t.h.ServeHTTP(w, in)
	}()
	select {
	case status, ok := <-w.started:
		if !ok {
			return nil, io.ErrUnexpectedEOF
		}
		return &http.Response{Status: fmt.Sprint(status, " ", http.StatusText(status)), StatusCode: status, Proto: "HTTP/1.1",
			ProtoMajor: 1, ProtoMinor: 1, Header: w.header, Body: reader, ContentLength: -1, Request: r}, nil
	case <-r.Context().Done():
		reader.CloseWithError(r.Context().Err())
		return nil, r.Context().Err()
	}
}

type pipeWriter struct {
	header  http.Header
	body    *io.PipeWriter
	started chan int
	once    sync.Once
}

func (w *pipeWriter) Header() http.Header { return w.header }

func (w *pipeWriter) WriteHeader(status int) { w.once.Do(func() { w.started <- status }) }

func (w *pipeWriter) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.body.Write(b)
}
