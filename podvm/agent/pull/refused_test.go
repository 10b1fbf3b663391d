// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// wantError pulls what cannot be pulled: the sentence names the reference and is of a
// class, and nothing is left.
func (w *world) wantError(t *testing.T, ref string, class func(error) bool, words ...string) {
	t.Helper()
	r, err := w.mount(t.Context(), ref)
	if err == nil {
		r.leave(t)
		t.Fatal("it was pulled")
	}
	if !class(err) {
		t.Errorf("the class is another one: %v", err)
	}
	for _, word := range append(words, ref) {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("it does not say %q: %v", word, err)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than one line: %v", err)
	}
	w.wantNothing()
}

func TestRefused(t *testing.T) {
	w := newWorld(t)
	w.push("app:1", simple(t, "hello"))
	w.push("foreign:1", imageFor(t, "s390x", gzipped(t, archived(t, file("a", "a")))))
	artifact := static.NewLayer([]byte("chart"), "application/vnd.cncf.helm.chart.content.v1.tar+gzip")
	w.push("chart:1", imageOf(t, layer{artifact, sum(t, []byte("chart"))}))
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := gone.Addr().String()
	gone.Close()
	for name, c := range map[string]struct {
		ref   string
		class func(error) bool
		words []string
	}{
		"unknown tag":           {w.host + "/app:2", errdefs.IsNotFound, []string{"does not have it"}},
		"unknown name":          {w.host + "/nobody:1", errdefs.IsNotFound, nil},
		"unknown digest":        {w.host + "/app@sha256:" + strings.Repeat("ab", 32), errdefs.IsNotFound, nil},
		"no reference":          {w.host + "/UPPER:1", errdefs.IsInvalidArgument, []string{"not a reference"}},
		"empty":                 {"", errdefs.IsInvalidArgument, []string{"empty"}},
		"an id":                 {"sha256:" + strings.Repeat("ab", 32), errdefs.IsInvalidArgument, []string{"id of an image"}},
		"another machine":       {w.host + "/foreign:1", errdefs.IsFailedPrecondition, []string{"s390x"}},
		"not a file system":     {w.host + "/chart:1", errdefs.IsInvalidArgument, []string{"helm.chart"}},
		"nobody there":          {nobody + "/app:1", errdefs.IsUnavailable, []string{nobody}},
		"a name nobody has":     {"registry.invalid/app:1", errdefs.IsUnavailable, []string{"registry.invalid"}},
		"address of no machine": {"127.0.0.1:99999/app:1", errdefs.IsUnavailable, nil},
	} {
		t.Run(name, func(t *testing.T) { w.wantError(t, c.ref, c.class, c.words...) })
	}
}

// lying changes the answers to requests whose path has a word.
func (w *world) lying(word string, change func(h http.Header, body []byte) []byte) {
	w.between(func(rw http.ResponseWriter, r *http.Request, inner http.Handler) {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, word) {
			inner.ServeHTTP(rw, r)
			return
		}
		rec := httptest.NewRecorder()
		inner.ServeHTTP(rec, r)
		body := change(rec.Header(), rec.Body.Bytes())
		for k, v := range rec.Header() {
			rw.Header()[k] = v
		}
		rw.WriteHeader(rec.Code)
		rw.Write(body)
	})
}

func digestOf(t *testing.T, l v1.Layer) string {
	t.Helper()
	d, err := l.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// A registry that sends something else than it was asked for.
func TestLyingRegistry(t *testing.T) {
	w := newWorld(t)
	one := gzipped(t, archived(t, file("etc/motd", "hello")))
	two := gzipped(t, archived(t, file("etc/motd", "HELLO")))
	img := imageOf(t, one)
	digest := w.push("app:1", img)
	w.push("app:2", imageOf(t, two))
	cfg, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	content := func(l v1.Layer) []byte {
		rc, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	resized := func(b []byte) func(http.Header, []byte) []byte {
		return func(h http.Header, _ []byte) []byte {
			h.Set("Content-Length", fmt.Sprint(len(b)))
			return b
		}
	}
	byDigest, byTag := w.host+"/app@"+digest.String(), w.host+"/app:1"
	for name, c := range map[string]struct {
		ref, word string
		change    func(http.Header, []byte) []byte
		class     func(error) bool
	}{
		"another manifest": {byDigest, "/manifests/", func(h http.Header, b []byte) []byte {
			return resized(append(bytes.Clone(b), ' '))(h, b)
		}, errdefs.IsDataLoss},
		"another configuration":  {byTag, cfg.String(), func(_ http.Header, b []byte) []byte { return bytes.Replace(b, []byte("linux"), []byte("LINUX"), 1) }, errdefs.IsDataLoss},
		"another layer":          {byTag, digestOf(t, one), resized(content(two)), errdefs.IsDataLoss},
		"a layer cut short":      {byTag, digestOf(t, one), func(h http.Header, b []byte) []byte { return resized(b[:len(b)-9])(h, b) }, errdefs.IsDataLoss},
		"a longer layer":         {byTag, digestOf(t, one), func(h http.Header, b []byte) []byte { return resized(append(bytes.Clone(b), 0))(h, b) }, errdefs.IsDataLoss},
		"a connection that ends": {byTag, digestOf(t, one), func(_ http.Header, b []byte) []byte { return b[:len(b)-9] }, errdefs.IsUnavailable},
		"a manifest without end": {byTag, "/manifests/", func(h http.Header, b []byte) []byte {
			return resized(append(bytes.Clone(b), bytes.Repeat([]byte{' '}, documentLimit)...))(h, b)
		}, errdefs.IsResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			w.lying(c.word, c.change)
			w.requests("")
			w.wantError(t, c.ref, c.class)
		})
	}
}

// An image whose maker lies: the digests are those of what the registry has.
func TestLyingImage(t *testing.T) {
	w := newWorld(t)
	tarball := archived(t, file("etc/motd", "hello"))
	w.push("diffid:1", imageOf(t, layer{gzipped(t, tarball), sum(t, []byte("something else"))}))
	w.push("notar:1", imageOf(t, gzipped(t, bytes.Repeat([]byte("no archive "), 100))))
	w.push("short:1", imageOf(t, gzipped(t, tarball[:514])))
	damaged := static.NewLayer([]byte("\x1f\x8b\x08\x00 this is no gzip"), types.DockerLayer)
	w.push("nogzip:1", imageOf(t, layer{damaged, sum(t, nil)}))
	for _, ref := range []string{"diffid:1", "notar:1", "short:1", "nogzip:1"} {
		t.Run(ref, func(t *testing.T) { w.wantError(t, w.host+"/"+ref, errdefs.IsDataLoss) })
	}
}

func TestTooLarge(t *testing.T) {
	w := newWorld(t)
	big := make([]byte, 17<<20)
	rand.Read(big)
	w.push("big:1", imageOf(t, gzipped(t, archived(t, file("big", string(big))))))
	w.push("bomb:1", imageOf(t, gzipped(t, archived(t, file("zeros", string(make([]byte, 24<<20)))))))
	same := make([]entry, 17<<10) // more than the fewest files a root has
	for i := range same {
		same[i] = dir("same/")
	}
	w.push("entries:1", imageOf(t, gzipped(t, archived(t, same...))))
	many := make([]entry, 17<<10)
	for i := range many {
		many[i] = file(fmt.Sprint("f", i), "")
	}
	w.push("files:1", imageOf(t, gzipped(t, archived(t, many...))))
	for _, ref := range []string{"big:1", "bomb:1", "entries:1", "files:1"} {
		t.Run(ref, func(t *testing.T) {
			w.wantError(t, w.host+"/"+ref, errdefs.IsResourceExhausted, "16777216 bytes", "default_memory")
		})
	}
}

// Nothing an archive says leads out of the root.
func TestNoEscape(t *testing.T) {
	w := newWorld(t)
	outside := filepath.Join(w.dir, "outside")
	if err := os.WriteFile(outside, []byte("untouched"), 0o644); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20)
	for name, entries := range map[string][]entry{
		"dots":               {file(up+outside[1:], "changed")},
		"absolute":           {file(outside, "changed")},
		"link":               {{tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: w.dir}, ""}, file("out/outside", "changed")},
		"hardlink":           {{tar.Header{Name: "copy", Typeflag: tar.TypeLink, Linkname: up + outside[1:]}, ""}, file("copy", "changed")},
		"whiteout":           {{tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: w.dir}, ""}, file("out/.wh.outside", "")},
		"opaque":             {{tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: w.dir}, ""}, file("out/.wh..wh..opq", "")},
		"dots of a whiteout": {file("a/.wh...", ""), file("a/.wh..", "")},
	} {
		w.push("escape:"+strings.ReplaceAll(name, " ", "-"), imageOf(t, gzipped(t, archived(t, entries...))))
		r, err := w.mount(t.Context(), w.host+"/escape:"+strings.ReplaceAll(name, " ", "-"))
		if err == nil {
			r.leave(t)
		}
		if b, err := os.ReadFile(outside); err != nil || string(b) != "untouched" {
			t.Fatalf("%s: the file outside has %q, %v", name, b, err)
		}
	}
}

// secret must not be in any message.
const secret = "correct-horse-battery"

func basic(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

func (w *world) auth(t *testing.T, auths map[string]any) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"auths": auths})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.store.cfg.AuthFile, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// wantCredentials tries right and wrong credentials on a registry that wants some.
func (w *world) wantCredentials(t *testing.T) {
	ref := w.host + "/team/app:1"
	for name, auths := range map[string]map[string]any{
		"host":             {w.host: map[string]any{"auth": basic("user", secret)}},
		"host and path":    {w.host + "/team": map[string]any{"auth": basic("user", secret)}, w.host: map[string]any{"auth": basic("user", "wrong")}},
		"user, password":   {w.host: map[string]any{"username": "user", "password": secret}},
		"as docker writes": {"https://" + w.host + "/v1/": map[string]any{"auth": basic("user", secret)}},
		"a star":           {"*" + w.host[strings.Index(w.host, "."):]: map[string]any{"auth": basic("user", secret)}},
	} {
		t.Run(name, func(t *testing.T) {
			w.auth(t, auths)
			w.mustMount(ref).leave(t)
			if err := w.store.RemoveAll(); err != nil {
				t.Fatal(err)
			}
		})
	}
	for name, auths := range map[string]map[string]any{
		"wrong":            {w.host: map[string]any{"auth": basic("user", secret+"x")}},
		"another path":     {w.host + "/teams": map[string]any{"auth": basic("user", secret)}},
		"another registry": {"other.example:5000": map[string]any{"auth": basic("user", secret)}},
		"none":             {},
	} {
		t.Run(name, func(t *testing.T) {
			w.auth(t, auths)
			w.wantError(t, ref, errdefs.IsPermissionDenied, w.host, "PULL_AUTH_FILE")
			if _, err := w.mount(t.Context(), ref); strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), basic("user", secret+"x")) {
				t.Errorf("the password is in the error: %v", err)
			}
		})
	}
}

func TestBasicCredentials(t *testing.T) {
	w := newWorld(t)
	w.push("team/app:1", simple(t, "hello"))
	w.between(func(rw http.ResponseWriter, r *http.Request, inner http.Handler) {
		if user, password, _ := r.BasicAuth(); user != "user" || password != secret {
			rw.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			rw.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(rw, r)
	})
	w.wantCredentials(t)
}

// tokens has the registry want a token, which it sells for credentials.
func (w *world) tokens() {
	w.between(func(rw http.ResponseWriter, r *http.Request, inner http.Handler) {
		if r.URL.Path == "/token" {
			user, password, _ := r.BasicAuth()
			bought := user == "user" && password == secret
			if r.Method == http.MethodPost { // OAuth2, for an identity token
				b, _ := io.ReadAll(r.Body)
				form, _ := url.ParseQuery(string(b))
				bought = form.Get("refresh_token") == secret
			}
			if !bought {
				rw.WriteHeader(http.StatusUnauthorized)
				return
			}
			fmt.Fprint(rw, `{"token": "good", "access_token": "good"}`)
			return
		}
		if r.Header.Get("Authorization") != "Bearer good" {
			rw.Header().Set("WWW-Authenticate", `Bearer realm="http://`+w.host+`/token",service="test"`)
			rw.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(rw, r)
	})
}

func TestTokenCredentials(t *testing.T) {
	w := newWorld(t)
	w.push("team/app:1", simple(t, "hello"))
	w.tokens()
	w.wantCredentials(t)
	w.auth(t, map[string]any{w.host: map[string]any{"identitytoken": secret}})
	w.mustMount(w.host + "/team/app:1").leave(t)
}

func TestDamagedAuthFile(t *testing.T) {
	w := newWorld(t)
	w.push("app:1", simple(t, "hello"))
	for _, text := range []string{secret, `{"auths": "` + secret + `"}`, `{"auths": {"r.example": {"auth": "` + secret + `"}}}`} {
		if err := os.WriteFile(w.store.cfg.AuthFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		w.wantError(t, w.host+"/app:1", errdefs.IsFailedPrecondition, "auth.json")
		if _, err := w.mount(t.Context(), w.host+"/app:1"); strings.Contains(err.Error(), secret) {
			t.Errorf("the file's words are in the error: %v", err)
		}
	}
	creds := credentials{"r.example": {Password: secret}}
	if s := fmt.Sprintf("%v %+v %#v %s", creds, creds, creds, creds.LogValue()); strings.Contains(s, secret) {
		t.Errorf("credentials print themselves: %s", s)
	}
}

func TestKeysOfCredentials(t *testing.T) {
	for key, want := range map[string]string{
		"https://" + name.DefaultRegistry + "/v1/": name.DefaultRegistry, dockerDomain: name.DefaultRegistry,
		"registry-1." + dockerDomain + "/library": name.DefaultRegistry + "/library",
		"http://r.example:5000/":                  "r.example:5000", "r.example/a/b": "r.example/a/b",
	} {
		if got := credentialKey(key); got != want {
			t.Errorf("%s is %s, want %s", key, got, want)
		}
	}
	for _, c := range []struct {
		key, repository string
		want            bool
	}{
		{"r.example", "r.example/a", true}, {"r.example/a", "r.example/a/b", true}, {"r.example/a", "r.example/ab", false},
		{"*.example", "r.example/a", true}, {"*.example", "a.r.example/a", false}, {"r.example:5000", "r.example/a", false}, {"[", "r.example/a", false},
	} {
		if got := fits(c.key, c.repository); got != c.want {
			t.Errorf("%s fits %s: %v", c.key, c.repository, got)
		}
	}
}

// Plain HTTP stays on this machine unless it is allowed, also for those who are sent
// there.
func TestPlainHTTP(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Insecure = []string{"r.example", "10.0.0.1:5000"} })
	for at, want := range map[string]bool{
		"http://127.0.0.1:5000/v2/": true, "http://localhost:5000/v2/": true, "http://[::1]:5000/v2/": true, "http://r.example:80/v2/": true,
		"http://10.0.0.1:5000/v2/": true, "http://10.0.0.1:5001/v2/": false, "http://192.168.0.1/v2/": false, "http://127.0.0.1.example/v2/": false,
	} {
		u, err := url.Parse(at)
		if err != nil {
			t.Fatal(err)
		}
		if got := w.store.mayBePlain(u); got != want {
			t.Errorf("%s: %v, want %v", at, got, want)
		}
	}
	if p, err := w.store.parse("r.example:80/app:1"); err != nil || p.name.Context().Scheme() != "http" {
		t.Errorf("a registry of the list: %v, %v", p, err)
	}
	w.push("app:1", simple(t, "hello"))
	w.between(func(rw http.ResponseWriter, r *http.Request, inner http.Handler) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(rw, r, "http://storage.example/blob", http.StatusTemporaryRedirect)
			return
		}
		inner.ServeHTTP(rw, r)
	})
	w.wantError(t, w.host+"/app:1", errdefs.IsFailedPrecondition, "storage.example", "PULL_INSECURE_REGISTRIES")
}

// A registry with a certificate of an authority that the system does not know.
func TestCertificates(t *testing.T) {
	srv := httptest.NewUnstartedServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	defer srv.Close()
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	host := strings.TrimPrefix(srv.URL, "https://")
	newWorld(t).wantError(t, host+"/app:1", errdefs.IsFailedPrecondition, "PULL_CA_FILE")
	newWorld(t, func(c *Config) { c.CA = ca }).wantError(t, host+"/app:1", errdefs.IsNotFound)
}
