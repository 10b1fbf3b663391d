// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestLag checks that changes are seen late, and not later than the Config says.
func TestLag(t *testing.T) {
	now := newClock()
	s := New(Config{Now: now.now, MaxLag: 5 * time.Second, Seed: 7})
	c := newClient(t, s)
	unseen := 0
	for range 20 {
		id := c.run()
		if _, err := c.try("DescribeInstances", "InstanceId.1", id); err != nil {
			unseen++
			c.fails("InvalidInstanceID.NotFound", "TerminateInstances", "InstanceId.1", id)
			if n := c.do("DescribeInstances", "Filter.1.Name", "instance-id", "Filter.1.Value.1", id).all("reservationSet/item"); len(n) != 0 {
				t.Error("a filter finds what its id does not")
			}
		}
		now.add(5 * time.Second)
		if state := c.state(id); state == pending { // running is seen late too
			now.add(5 * time.Second)
		}
		if state := c.state(id); state != running {
			t.Errorf("ten seconds after its launch an instance is %s", state)
		}
		c.do("TerminateInstances", "InstanceId.1", id)
		now.add(5 * time.Second)
		if state := c.state(id); state != terminated {
			t.Errorf("five seconds after its end an instance is %s", state)
		}
	}
	if unseen == 0 {
		t.Error("every new instance was seen at once")
	}
}

// TestThrottle empties the buckets of the real service.
func TestThrottle(t *testing.T) {
	now := newClock()
	s := New(Config{Now: now.now, Throttle: true})
	c := newClient(t, s)
	count := func(action string, params ...string) int {
		n := 0
		for ; n < 300; n++ {
			_, err := c.try(action, params...)
			var e *Error
			if errors.As(err, &e) && e.Code == "RequestLimitExceeded" {
				if e.Status != 503 {
					t.Errorf("throttled with status %d", e.Status)
				}
				return n
			}
		}
		return n
	}
	for _, tt := range []struct {
		want   int
		action string
		params []string
	}{
		{5, "RunInstances", launch()},
		{5, "StartInstances", []string{"InstanceId.1", "i-00000000"}},
		{100, "TerminateInstances", []string{"InstanceId.1", "i-00000000"}},
		{100, "CreateTags", []string{"ResourceId.1", DefaultSubnet, "Tag.1.Key", "a"}},
		{50, "DescribeInstances", nil},
		{100, "DescribeInstances", []string{"MaxResults", "5"}},
		{50, "DeleteVolume", []string{"VolumeId", "vol-00000000"}},
	} {
		if got := count(tt.action, tt.params...); got != tt.want {
			t.Errorf("%s %v: %d calls went through, want %d", tt.action, tt.params, got, tt.want)
		}
	}
	now.add(time.Second)
	if got := count("RunInstances", launch()...); got != 2 {
		t.Errorf("a second later %d launches went through, want 2", got)
	}
	now.add(time.Hour)
	// One call for 1000 instances takes all resource tokens; there are not as many addresses.
	many := launch("MaxCount", "1000", "MinCount", "1000")
	c.fails("InsufficientFreeAddressesInSubnet", "RunInstances", many...)
	c.fails("RequestLimitExceeded", "RunInstances", launch()...)
}

func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		c := newClient(t, s)
		hits := s.Inject(Fault{Action: "RunInstances", Type: "m6a.large", Zone: "us-east-1a", Market: "on-demand", Skip: 1, Times: 2,
			Err: &Error{Status: 500, Code: "InternalError", Message: "sorry"}})
		c.run()
		c.fails("InternalError", "RunInstances", launch()...)
		c.run("SubnetId", DefaultSubnetB)
		c.run("InstanceType", "m6a.xlarge")
		c.run("InstanceMarketOptions.MarketType", "spot")
		c.fails("InternalError", "RunInstances", launch()...)
		c.run()
		if hits() != 2 || s.Calls("RunInstances") != 7 {
			t.Errorf("%d hits in %d calls, want 2 in 7", hits(), s.Calls("RunInstances"))
		}
		s.ClearFaults()

		before := len(s.Instances())
		s.Inject(Fault{Action: "RunInstances", Times: 1, Lost: true})
		if _, err := c.try("RunInstances", launch("ClientToken", "lost")...); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a lost reply: %v", err)
		}
		if n := len(s.Instances()); n != before+1 {
			t.Errorf("the lost reply's effect: %d instances, want %d", n, before+1)
		}
		c.run("ClientToken", "lost")
		if n := len(s.Instances()); n != before+1 {
			t.Errorf("the token made another: %d instances, want %d", n, before+1)
		}

		s.Inject(Fault{Action: "RunInstances", Times: 1, Dies: &Error{Code: "Client.VolumeLimitExceeded", Message: "Volume limit exceeded"}})
		if state := c.state(c.run()); state != terminated {
			t.Errorf("an instance that was to die is %s", state)
		}
		s.Inject(Fault{Action: "DescribeInstances", Times: 1, Malformed: true})
		var e *Error
		if _, err := c.try("DescribeInstances"); err == nil || errors.As(err, &e) {
			t.Errorf("a malformed reply: %v", err)
		}
		start := time.Now()
		s.Inject(Fault{Action: "DescribeInstances", Times: 1, Delay: 3 * time.Second, Slow: time.Millisecond})
		c.do("DescribeInstances")
		if d := time.Since(start); d < 4*time.Second {
			t.Errorf("a slow reply took %v", d)
		}
		s.Inject(Fault{Action: "RunInstances", Times: 1, Partial: &Error{Status: 500, Code: "InternalError", Message: "half way"}})
		known := len(s.Leaks(map[string]string{"owner": "test"}))
		c.fails("InternalError", "RunInstances", launch()...)
		if l := s.Leaks(map[string]string{"owner": "test"}); len(l) != known+2 {
			t.Errorf("a launch that failed half way left %d things, want a volume and an interface: %v", len(l)-known, l)
		}
	})
}

// TestHang needs sockets: whoever waits for an answer has to leave.
func TestHang(t *testing.T) {
	s := New(Config{})
	s.Inject(Fault{Hang: true, Times: 1})
	s.Inject(Fault{Lost: true, Times: 1})
	srv := httptest.NewServer(s)
	defer srv.Close()
	post := func(ctx context.Context) error {
		body := "Action=DescribeVpcs&Version=" + ec2Version
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, srv.URL+"/", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		newClient(t, s).sign(r, "ec2", []byte(body))
		resp, err := http.DefaultTransport.RoundTrip(r)
		if err == nil {
			resp.Body.Close()
			err = fmt.Errorf("status %d", resp.StatusCode)
		}
		return err
	}
	ctx, leave := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- post(ctx) }()
	for s.Calls("DescribeVpcs") == 0 {
		select {
		case err := <-done:
			t.Fatalf("a hanging call returned: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	leave()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("a hanging call: %v", err)
	}
	if err := post(context.Background()); !errors.Is(err, io.EOF) && !errors.As(err, new(*net.OpError)) {
		t.Errorf("a lost reply: %v", err)
	}
	if err := post(context.Background()); err.Error() != "status 200" {
		t.Errorf("without a fault: %v", err)
	}
}

func TestCredentials(t *testing.T) {
	now := newClock()
	s := New(Config{Now: now.now, MaxSkew: 5 * time.Minute})
	c := newClient(t, s)
	bad := newClient(t, s)
	bad.key.Secret = "wrong"
	bad.fails("AuthFailure", "DescribeVpcs")
	bad.fails("AuthFailure", "GetCallerIdentity")
	bad.key = Key{ID: "AKIAUNKNOWN", Secret: "x"}
	bad.fails("AuthFailure", "DescribeVpcs")
	bad.key = DefaultKey
	bad.key.Session = "of nobody"
	bad.fails("AuthFailure", "DescribeVpcs")

	r, err := http.NewRequest(http.MethodPost, "http://ec2.test/", strings.NewReader("Action=DescribeVpcs&Version="+ec2Version))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.Transport().RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 401 || !strings.Contains(string(text), "<Code>AuthFailure</Code>") {
		t.Errorf("an unsigned request: %d %s %v", resp.StatusCode, text, err)
	}

	limited := newClient(t, s)
	limited.key = Key{ID: "AKIALIMITED", Secret: "s", User: "reader", Allow: []string{"ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags"}, Deny: []string{"ec2:DescribeVpcs"}}
	s.SetKey(limited.key)
	limited.do("DescribeInstances")
	limited.run()
	_, err = limited.try("TerminateInstances", "InstanceId.1", "i-00000000")
	if e, ok := err.(*Error); !ok || e.Code != "UnauthorizedOperation" || e.Status != 403 || !strings.Contains(e.Message, "user/reader is not authorized to perform: ec2:TerminateInstances") {
		t.Errorf("without permission: %v", err)
	}
	limited.fails("UnauthorizedOperation", "DescribeVpcs")
	untagging := limited.key
	untagging.Deny = []string{"ec2:CreateTags"}
	s.SetKey(untagging)
	if _, err := limited.try("RunInstances", "ImageId", DefaultImage, "InstanceType", "m6a.large", "MinCount", "1", "MaxCount", "1",
		"TagSpecification.1.ResourceType", "instance", "TagSpecification.1.Tag.1.Key", "a"); err == nil || !strings.Contains(err.Error(), "ec2:CreateTags") {
		t.Errorf("a launch with tags, and no permission to tag: %v", err)
	}
	limited.do("GetCallerIdentity")
	// Parts of a launch need permissions of their own.
	for denied, more := range map[string][]string{"ec2:CreateTags": nil, "iam:PassRole": {"IamInstanceProfile.Name", "node"}} {
		limited.key.Allow, limited.key.Deny = nil, []string{denied}
		s.SetKey(limited.key)
		if _, err := limited.try("RunInstances", launch(more...)...); err == nil || !strings.Contains(err.Error(), "perform: "+denied) {
			t.Errorf("a launch without %s: %v", denied, err)
		}
	}
	limited.key.Deny = []string{"kms:*"}
	s.SetKey(limited.key)
	id := limited.run("BlockDeviceMapping.1.DeviceName", "/dev/xvda", "BlockDeviceMapping.1.Ebs.Encrypted", "true", "BlockDeviceMapping.1.Ebs.KmsKeyId", "alias/mine")
	if i := c.do("DescribeInstances", "InstanceId.1", id).all("reservationSet/item/instancesSet/item")[0]; i.at("instanceState/name") != terminated ||
		i.at("stateReason/code") != "Client.InternalError" {
		t.Errorf("a launch with a key that may not be used: %s for %s", i.at("instanceState/name"), i.at("stateReason/code"))
	}
	s.RemoveKey(limited.key.ID)
	limited.fails("AuthFailure", "DescribeInstances")
}

// TestTemporaryCredentials: a role by web identity, and how old a signature may be.
func TestTemporaryCredentials(t *testing.T) {
	now := newClock()
	s := New(Config{Now: now.now, MaxSkew: 5 * time.Minute})
	c := newClient(t, s)
	jwt := func(aud string, exp time.Time) string {
		part := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
		return part(`{"alg":"RS256"}`) + "." + part(fmt.Sprintf(`{"sub":"system:serviceaccount:kube-system:caa","aud":[%q],"exp":%d}`, aud, exp.Unix())) + ".c2ln"
	}
	role := []string{"RoleArn", "arn:aws:iam::" + DefaultAccount + ":role/peer-pods", "RoleSessionName", "node-1", "WebIdentityToken"}
	unsigned := newClient(t, s)
	unsigned.key = Key{ID: "nobody"}
	unsigned.fails("InvalidIdentityToken", "AssumeRoleWithWebIdentity", append(role, "x")...)
	unsigned.fails("InvalidIdentityToken", "AssumeRoleWithWebIdentity", append(role, jwt("other", now.at.Add(time.Hour)))...)
	unsigned.fails("ExpiredTokenException", "AssumeRoleWithWebIdentity", append(role, jwt("sts.amazonaws.com", now.at))...)
	out := unsigned.do("AssumeRoleWithWebIdentity", append(role, jwt("sts.amazonaws.com", now.at.Add(time.Hour)))...)
	const creds = "AssumeRoleWithWebIdentityResult/Credentials/"
	temp := newClient(t, s)
	temp.key = Key{ID: out.at(creds + "AccessKeyId"), Secret: out.at(creds + "SecretAccessKey"), Session: out.at(creds + "SessionToken")}
	if arn := temp.do("GetCallerIdentity").at("GetCallerIdentityResult/Arn"); arn != "arn:aws:sts::"+DefaultAccount+":assumed-role/peer-pods/node-1" {
		t.Errorf("the role is %s", arn)
	}
	temp.do("DescribeInstances")
	now.add(time.Hour)
	temp.fails("RequestExpired", "DescribeInstances")
	c.do("DescribeInstances")
	slow := newClient(t, s)
	slow.s = &Server{cfg: Config{Now: func() time.Time { return now.at.Add(-6 * time.Minute) }, Region: DefaultRegion}}
	form := "Action=DescribeVpcs&Version=" + ec2Version
	r, err := http.NewRequest(http.MethodPost, "http://ec2.test/", strings.NewReader(form))
	if err != nil {
		t.Fatal(err)
	}
	slow.sign(r, "ec2", []byte(form))
	resp, err := s.Transport().RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(text), "<Code>RequestExpired</Code>") {
		t.Errorf("signed six minutes ago: %s %v", text, err)
	}
}

// TestSpot takes a spot instance from its launch to its interruption.
func TestSpot(t *testing.T) {
	now := newClock()
	s := New(Config{Now: now.now, StopTime: 10 * time.Second})
	c := newClient(t, s)
	id := c.run("InstanceMarketOptions.MarketType", "spot", "TagSpecification.4.ResourceType", "spot-instances-request",
		"TagSpecification.4.Tag.1.Key", "owner", "TagSpecification.4.Tag.1.Value", "test")
	onDemand := c.run()
	if err := s.Interrupt(onDemand); err == nil {
		t.Error("an instance on demand was interrupted")
	}
	c.fails("UnsupportedOperation", "StopInstances", "InstanceId.1", id)
	d := c.do("DescribeInstances", "Filter.1.Name", "instance-lifecycle", "Filter.1.Value.1", "spot")
	sir := d.at("reservationSet/item/instancesSet/item/spotInstanceRequestId")
	imds := s.Metadata(id)
	notice := func() (int, string) {
		w := httptest.NewRecorder()
		imds.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/latest/meta-data/spot/instance-action", nil))
		return w.Code, w.Body.String()
	}
	if code, _ := notice(); code != 404 {
		t.Errorf("a notice before there is one: %d", code)
	}
	if err := s.Interrupt(id); err != nil {
		t.Fatal(err)
	}
	if code, text := notice(); code != 200 || text != `{"action":"terminate","time":"2026-11-22T12:02:00Z"}` {
		t.Errorf("notice %d %s", code, text)
	}
	status := func() string {
		q := c.do("DescribeSpotInstanceRequests", "SpotInstanceRequestId.1", sir).all("spotInstanceRequestSet/item")[0]
		return q.at("state") + " " + q.at("status/code")
	}
	if got := status(); got != "active marked-for-termination" {
		t.Errorf("request %s", got)
	}
	now.add(2*time.Minute - time.Second)
	if got := c.state(id); got != running {
		t.Errorf("before its time the instance is %s", got)
	}
	now.add(time.Second)
	if got := c.state(id); got != shuttingDown {
		t.Errorf("at its time the instance is %s", got)
	}
	now.add(10 * time.Second)
	d = c.do("DescribeInstances", "InstanceId.1", id)
	if got := d.at("reservationSet/item/instancesSet/item/stateReason/code"); got != "Server.SpotInstanceTermination" {
		t.Errorf("it ended for %q", got)
	}
	if got := status(); got != "closed instance-terminated-no-capacity" {
		t.Errorf("request %s", got)
	}
	other := c.do("RunInstances", launch("InstanceMarketOptions.MarketType", "spot")...).at("instancesSet/item/spotInstanceRequestId")
	c.do("CancelSpotInstanceRequests", "SpotInstanceRequestId.1", other)
	if q := c.do("DescribeSpotInstanceRequests", "Filter.1.Name", "state", "Filter.1.Value.1", "cancelled").all("spotInstanceRequestSet/item"); len(q) != 1 {
		t.Errorf("cancelled requests: %v", q)
	}
}
