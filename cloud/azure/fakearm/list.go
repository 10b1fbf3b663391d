// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// list answers for a collection.
func (s *Server) list(c *call, k *kind) (*reply, *apiError) {
	scope := c.r.URL.Path
	if err := c.authorize(k.name+"/read", scope); err != nil {
		return nil, err
	}
	limit := "ListNetwork"
	switch {
	case k.name == "Microsoft.Compute/virtualMachines":
		limit = "ListVM"
	case k.provider() == "Microsoft.Compute":
		limit = "ListDisk"
	}
	if err := s.throttle(c.now, limit); err != nil {
		return nil, err
	}
	prefix := ""
	if k.child {
		prefix = key(strings.TrimRight(c.r.URL.Path, "/")) + "/"
		if parent := prefix[:strings.LastIndex(strings.TrimSuffix(prefix, "/"), "/")]; s.resources[parent] == nil {
			return nil, &apiError{status: http.StatusNotFound, code: "ParentResourceNotFound", message: fmt.Sprintf(
				"Failed to perform '%s' on resource(s) of type '%s', because the parent resource '%s' could not be found.", "read", k.name, parent)}
		}
	}
	found := s.listed(c.now, s.cfg.Timing.ListLag, func(r *resource) bool {
		return r.kind == k && (c.path.group == "" || strings.EqualFold(r.group, c.path.group)) && strings.HasPrefix(key(r.id), prefix)
	})
	return s.page(c, len(found), func(i int) any { return s.view(c, found[i]) })
}

// page answers a part of a list and where the rest is.
func (s *Server) page(c *call, n int, item func(i int) any) (*reply, *apiError) {
	from := 0
	if t := c.query("$skiptoken"); t != "" {
		var err error
		if from, err = strconv.Atoi(t); err != nil || from < 0 {
			return nil, badRequest("InvalidSkipToken", "", "The provided skip token '%s' is invalid.", t)
		}
	}
	size := s.cfg.PageSize
	if t := c.query("$top"); t != "" {
		top, err := strconv.Atoi(t)
		if err != nil || top < 1 {
			return nil, badRequest("InvalidTop", "", "The provided $top '%s' is invalid.", t)
		}
		size = min(size, top)
	}
	values := []any{}
	for i := from; i < min(n, from+size); i++ {
		values = append(values, item(i))
	}
	body := map[string]any{"value": values}
	if from+size < n {
		q := url.Values{}
		for k, v := range c.r.URL.Query() {
			q[k] = v
		}
		q.Set("$skiptoken", strconv.Itoa(from+size))
		body["nextLink"] = c.base() + c.r.URL.Path + "?" + q.Encode()
	}
	return &reply{status: http.StatusOK, body: body}, nil
}

// groups answers for subscriptions, resource groups and their lists.
func (s *Server) groups(c *call) (*reply, *apiError) {
	if err := c.versionOf("Microsoft.Resources/resourceGroups", groupVersions); err != nil {
		return nil, err
	}
	seg := strings.Split(strings.Trim(c.r.URL.Path, "/"), "/")
	if c.r.Method != http.MethodGet && c.r.Method != http.MethodHead {
		return nil, methodNotAllowed(c)
	}
	group := func(name string) map[string]any {
		return map[string]any{"id": "/subscriptions/" + s.cfg.Subscription + "/resourceGroups/" + name, "name": name, "type": "Microsoft.Resources/resourceGroups",
			"location": s.cfg.Region, "properties": map[string]any{"provisioningState": "Succeeded"}}
	}
	scope := "/" + strings.Join(seg, "/")
	last := strings.ToLower(seg[len(seg)-1])
	subscription := map[string]any{"id": "/subscriptions/" + s.cfg.Subscription, "subscriptionId": s.cfg.Subscription,
		"tenantId": s.cfg.Tenant, "displayName": "fakearm", "state": "Enabled"}
	switch {
	case len(seg) <= 2 && strings.EqualFold(seg[0], "subscriptions"):
		if err := c.authorize("Microsoft.Resources/subscriptions/read", scope); err != nil {
			return nil, err
		}
		if len(seg) == 1 {
			return s.page(c, 1, func(int) any { return subscription })
		}
		return &reply{status: http.StatusOK, body: subscription}, nil
	case len(seg) == 3 && last == "resourcegroups":
		if err := c.authorize("Microsoft.Resources/subscriptions/resourceGroups/read", scope); err != nil {
			return nil, err
		}
		return s.page(c, len(s.cfg.Groups), func(i int) any { return group(s.cfg.Groups[i]) })
	case len(seg) == 4 && strings.EqualFold(seg[2], "resourceGroups"):
		if err := c.authorize("Microsoft.Resources/subscriptions/resourceGroups/read", scope); err != nil {
			return nil, err
		}
		if c.r.Method == http.MethodHead {
			return &reply{status: http.StatusNoContent}, nil
		}
		return &reply{status: http.StatusOK, body: group(seg[3])}, nil
	case (len(seg) == 3 || len(seg) == 5) && last == "resources":
		if err := c.authorize("Microsoft.Resources/subscriptions/resourceGroups/resources/read", scope); err != nil {
			return nil, err
		}
		return s.groupResources(c)
	}
	return nil, &apiError{status: http.StatusNotFound, code: "NotFound", message: "The requested path does not exist."}
}

var (
	tagFilter  = regexp.MustCompile(`^tagName eq '([^']*)'(?: and tagValue eq '([^']*)')?$`)
	typeFilter = regexp.MustCompile(`^resourceType eq '([^']*)'$`)
)

// groupResources lists a group's resources from ARM's index, which lags more than the
// providers' own lists. A filter by tag excludes every other one, and its results
// carry no tags (learn.microsoft.com, "Resources - List By Resource Group").
func (s *Server) groupResources(c *call) (*reply, *apiError) {
	c.fault = s.fault(c.r.Method, "resources", c.path.group, nil)
	if c.fault != nil {
		if err := c.fault.err(); err != nil {
			return nil, err
		}
	}
	if err := s.throttle(c.now, "ListGroup"); err != nil {
		return nil, err
	}
	want := func(*resource) bool { return true }
	byTag := false
	if f := strings.TrimSpace(c.query("$filter")); f != "" {
		if g := tagFilter.FindStringSubmatch(f); g != nil {
			byTag = true
			anyValue := !strings.Contains(f, "tagValue")
			want = func(r *resource) bool {
				for k, v := range object(r.doc, "tags") {
					if strings.EqualFold(k, g[1]) && (anyValue || v == g[2]) {
						return true
					}
				}
				return false
			}
		} else {
			var types []string
			for _, part := range strings.Split(f, " or ") {
				g := typeFilter.FindStringSubmatch(strings.TrimSpace(part))
				if g == nil {
					return nil, badRequest("InvalidFilterInQueryString", "", "Invalid $filter '%s' specified in the query string.", f)
				}
				types = append(types, strings.ToLower(g[1]))
			}
			want = func(r *resource) bool { return slices.Contains(types, strings.ToLower(r.kind.name)) }
		}
	}
	expand := c.query("$expand")
	for _, e := range strings.Split(expand, ",") {
		if e = strings.TrimSpace(e); e != "" && !slices.Contains([]string{"createdTime", "changedTime", "provisioningState"}, e) {
			return nil, badRequest("InvalidExpandInQueryString", "", "The $expand '%s' is not supported.", e)
		}
	}
	found := s.listed(c.now, s.cfg.Timing.IndexLag, func(r *resource) bool {
		return !r.kind.child && !r.provided() && (c.path.group == "" || strings.EqualFold(r.group, c.path.group)) && want(r)
	})
	return s.page(c, len(found), func(i int) any {
		r := found[i]
		m := map[string]any{"id": r.id, "name": r.name, "type": r.kind.name, "location": s.cfg.Region}
		if t := object(r.doc, "tags"); t != nil && !byTag {
			m["tags"] = t
		}
		if strings.Contains(expand, "createdTime") {
			m["createdTime"] = r.made.UTC().Format(time.RFC3339Nano)
		}
		if strings.Contains(expand, "changedTime") {
			m["changedTime"] = r.made.UTC().Format(time.RFC3339Nano)
		}
		if strings.Contains(expand, "provisioningState") {
			m["provisioningState"] = text(r.doc, "properties.provisioningState")
		}
		return m
	})
}

// provided tells whether the resource is one of another subscription that only this
// emulation keeps here.
func (r *resource) provided() bool { return strings.HasPrefix(r.id, "/subscriptions//") }

// regional answers for what has a subscription and no group: locations, operations,
// SKUs, shared and community galleries. done is false when it is none of these.
func (s *Server) regional(c *call) (rep *reply, fail *apiError, done bool) {
	seg := strings.Split(strings.Trim(c.r.URL.Path, "/"), "/")
	i := slices.IndexFunc(seg, func(t string) bool { return strings.EqualFold(t, "providers") })
	rest := seg[i+2:]
	switch {
	case len(rest) == 4 && strings.EqualFold(rest[0], "locations") && strings.EqualFold(rest[2], "operations"):
		if err := c.authorize(c.path.types[0]+"/locations/operations/read", c.r.URL.Path); err != nil {
			return nil, err, true
		}
		c.fault = s.fault(c.r.Method, "operations", rest[3], nil)
		if c.fault != nil {
			if err := c.fault.err(); err != nil {
				return nil, err, true
			}
		}
		rep, fail = s.operationStatus(c, rest[3])
		return rep, fail, true
	case len(rest) == 1 && strings.EqualFold(rest[0], "skus") && strings.EqualFold(c.path.types[0], "Microsoft.Compute"):
		rep, fail = s.skus(c)
		return rep, fail, true
	case len(rest) >= 4 && strings.EqualFold(rest[0], "locations") && (strings.EqualFold(rest[2], "sharedGalleries") || strings.EqualFold(rest[2], "communityGalleries")):
		rep, fail = s.foreignGallery(c, rest)
		return rep, fail, true
	}
	return nil, nil, false
}
