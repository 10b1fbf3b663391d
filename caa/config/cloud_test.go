// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

const (
	awsFile = "CLOUD_PROVIDER=aws\nPODVM_AMI_ID=ami-0123456789abcdef0\n"
	sub     = "/subscriptions/01234567-89ab-cdef-0123-456789abcdef/resourceGroups/g/providers/"
	azFile  = "CLOUD_PROVIDER=azure\nAZURE_SUBSCRIPTION_ID=01234567-89ab-cdef-0123-456789abcdef\nAZURE_REGION=eastus\nAZURE_RESOURCE_GROUP=g\n" +
		"AZURE_SUBNET_ID=" + sub + "Microsoft.Network/virtualNetworks/v/subnets/s\nAZURE_IMAGE_ID=" + sub + "Microsoft.Compute/galleries/a/images/i/versions/1.0.0\n"
	guid1 = "11111111-89ab-cdef-0123-456789abcdef"
)

func TestAWSDefaults(t *testing.T) {
	c, err := Load(write(t, awsFile), nil, Flags{})
	if err != nil {
		t.Fatal(err)
	}
	want := AWS{ImageID: "ami-0123456789abcdef0", InstanceType: "m6a.large", InstanceTypes: []string{"m6a.large"}, Spot: "false", Tenancy: "default"}
	if d := cmp.Diff(want, c.AWS); d != "" {
		t.Error(d)
	}
	if c.Provider != "aws" || c.Cloud.DisableCVM || c.Cloud.PublicIP || c.Cloud.RootVolumeGiB != 30 || c.Cloud.OverheadMiB != 320 || c.Cloud.Prices == nil {
		t.Errorf("%+v", c.Cloud)
	}
}

func TestAWSEveryKey(t *testing.T) {
	prices := filepath.Join(t.TempDir(), "prices")
	if err := os.WriteFile(prices, []byte("aws\tus-east-2\tt3.small\t7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(write(t, awsFile+`
AWS_REGION=us-east-2
AWS_ENDPOINT_URL=http://127.0.0.1:4566
AWS_PROFILE=p
AWS_SUBNET_ID=subnet-0123456789abcdef0, subnet-01234567
AWS_SG_IDS=sg-0123456789abcdef0
AWS_VPC_ID=vpc-0123456789abcdef0
PODVM_INSTANCE_TYPES=t3.small, m6a.xlarge
PODVM_INSTANCE_TYPE=m6a.xlarge
PODVM_LAUNCHTEMPLATE_NAME=mine
SSH_KP_NAME=k
ROOT_VOLUME_SIZE=40
USE_PUBLIC_IP=1
DISABLECVM=TRUE
AWS_SPOT=only
AWS_PLACEMENT_GROUP=g
AWS_TENANCY=dedicated
AWS_ROOT_VOLUME_KMS_KEY=alias/k
GUEST_OVERHEAD_MEMORY=0
INSTANCE_PRICES_FILE=`+prices+"\n"), []string{"AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY=hush/hush", "AWS_SESSION_TOKEN=hush2", "AWS_STS_REGIONAL_ENDPOINTS=regional"}, Flags{})
	if err != nil {
		t.Fatal(err)
	}
	want := AWS{
		Region: "us-east-2", Endpoint: "http://127.0.0.1:4566", AccessKeyID: "AKIAIOSFODNN7EXAMPLE", SecretAccessKey: "hush/hush", SessionToken: "hush2", Profile: "p",
		ImageID: "ami-0123456789abcdef0", InstanceType: "m6a.xlarge", InstanceTypes: []string{"t3.small", "m6a.xlarge"},
		SubnetIDs: []string{"subnet-0123456789abcdef0", "subnet-01234567"}, SecurityGroupIDs: []string{"sg-0123456789abcdef0"}, VPCID: "vpc-0123456789abcdef0",
		KeyName: "k", LaunchTemplate: "mine", RootVolumeKMSKey: "alias/k", Spot: "only", PlacementGroup: "g", Tenancy: "dedicated",
	}
	if d := cmp.Diff(want, c.AWS); d != "" {
		t.Error(d)
	}
	if !c.Cloud.DisableCVM || !c.Cloud.PublicIP || c.Cloud.RootVolumeGiB != 40 || c.Cloud.OverheadMiB != 0 {
		t.Errorf("%+v", c.Cloud)
	}
	if usd, _ := c.Cloud.Prices.Price("aws", "us-east-2", "t3.small"); usd != 7 {
		t.Errorf("t3.small costs %v", usd)
	}
	var b bytes.Buffer
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "c", c.AWS, "s", c.AWS.SecretAccessKey)
	js, err := json.Marshal(c.AWS)
	if shown := b.String() + fmt.Sprintf("%v %+v %#v %s", c.AWS, c.AWS, c.AWS, c.AWS.SecretAccessKey) + string(js); err != nil || strings.Contains(shown, "hush") || !strings.Contains(shown, redacted) {
		t.Errorf("%v, %s", err, shown)
	}
}

func TestAzureDefaults(t *testing.T) {
	c, err := Load(write(t, azFile), nil, Flags{})
	if err != nil {
		t.Fatal(err)
	}
	want := Azure{
		SubscriptionID: "01234567-89ab-cdef-0123-456789abcdef", Region: "eastus", ResourceGroup: "g",
		SubnetID: sub + "Microsoft.Network/virtualNetworks/v/subnets/s", ImageID: sub + "Microsoft.Compute/galleries/a/images/i/versions/1.0.0",
		InstanceSize: "Standard_DC2as_v5", InstanceSizes: []string{"Standard_DC2as_v5"}, SecurityType: "ConfidentialVM", Spot: "false",
		SSHUsername: "peerpod", SSHPublicKeyFile: "/root/.ssh/id_rsa.pub",
	}
	if d := cmp.Diff(want, c.Azure); d != "" {
		t.Error(d)
	}
	if c.Cloud.DisableCVM || c.Cloud.RootVolumeGiB != 0 {
		t.Errorf("%+v", c.Cloud)
	}
}

// TestAzureOrdinaryDefault: Azure refuses an ordinary VM of the confidential default.
func TestAzureOrdinaryDefault(t *testing.T) {
	for _, line := range []string{"DISABLECVM=true\n", "AZURE_SECURITY_TYPE=TrustedLaunch\n"} {
		c, err := Load(write(t, azFile+line), nil, Flags{})
		if err != nil || c.Azure.InstanceSize != "Standard_D2as_v5" {
			t.Errorf("%s: %v, %v", line, c, err)
		}
	}
}

// TestAzureAsInTheManual: the ConfigMap and the Secret that users of the OpenShift
// operator have (reference: its documentation of peer pods on Azure).
func TestAzureAsInTheManual(t *testing.T) {
	key := filepath.Join(t.TempDir(), "id_rsa.pub")
	if err := os.WriteFile(key, []byte("ssh-rsa AAAA"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load("", append(strings.Fields(azFile),
		"VXLAN_PORT=9000", "AZURE_INSTANCE_SIZE=Standard_B2als_v2", "AZURE_INSTANCE_SIZES=Standard_B2als_v2,Standard_D2as_v5,Standard_D4as_v5,Standard_D2ads_v5,Standard_NC24ads_A100_v4",
		"AZURE_NSG_ID="+sub+"Microsoft.Network/networkSecurityGroups/n", "PROXY_TIMEOUT=5m", "DISABLECVM=true",
		"AZURE_CLIENT_ID="+guid1, "AZURE_TENANT_ID="+guid1, "AZURE_CLIENT_SECRET=aB~8._-x", "AZURE_ZONES=1,3", "AZURE_SPOT=true", "AZURE_EPHEMERAL_OS_DISK=true",
		"AZURE_SSH_PUBLIC_KEY_FILE="+key, "SSH_USERNAME=core", "AZURE_ENDPOINT=https://localhost:1", "AZURE_AUTHORITY_HOST=https://login.microsoftonline.com/",
		"AZURE_FEDERATED_TOKEN_FILE=/var/run/token", "PODVM_AMI_ID=<x>", "AWS_SUBNET_IDS=x"), Flags{})
	if err != nil {
		t.Fatal(err)
	}
	a := c.Azure
	if a.SecurityType != "Standard" || !c.Cloud.DisableCVM || a.InstanceSize != "Standard_B2als_v2" || len(a.InstanceSizes) != 5 || string(a.ClientSecret) != "aB~8._-x" ||
		!slices.Equal(a.Zones, []string{"1", "3"}) || a.Spot != "true" || !a.EphemeralOSDisk || a.SSHUsername != "core" || a.SSHPublicKeyFile != key || a.NSGID == "" {
		t.Errorf("%+v", a)
	}
}

// problem is a configuration and the words of each problem it has; nothing more may
// be said of it.
type problem struct {
	name, file string
	env        []string
	want       []string
}

func (tc problem) check(t *testing.T) {
	_, err := Load(write(t, tc.file), tc.env, Flags{})
	if len(tc.want) == 0 {
		if err != nil {
			t.Error(err)
		}
		return
	}
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("Load = %v, want InvalidArgument with %q", err, tc.want)
	}
	lines := strings.Split(err.Error(), "\n")
	for _, w := range tc.want {
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, w) }) {
			t.Errorf("%q is in none of\n%v", w, err)
		}
	}
	if len(lines) != len(tc.want) {
		t.Errorf("%d problems, want %d:\n%v", len(lines), len(tc.want), err)
	}
	if strings.Contains(err.Error(), "hush") {
		t.Errorf("a secret in %v", err)
	}
}

func TestAWSProblems(t *testing.T) {
	for _, tc := range []problem{
		{name: "nothing", file: "CLOUD_PROVIDER=aws\n", want: []string{"PODVM_AMI_ID is not set: give the id"}},
		{name: "shapes", file: "CLOUD_PROVIDER=aws\nPODVM_AMI_ID=ami-1\nAWS_REGION=us-east-1a\nAWS_SUBNET_ID=subnet-0123456789abcdef0,vpc-01234567\nAWS_SG_IDS=sg-01234567,sg-01234567\n" +
			"PODVM_INSTANCE_TYPES=t3.small,large\nUSE_PUBLIC_IP=yes\nAWS_SPOT=maybe\nAWS_TENANCY=host\nROOT_VOLUME_SIZE=30Gi\nAWS_ENDPOINT_URL=http://ec2.example\nGUEST_OVERHEAD_MEMORY=-1\n",
			want: []string{`PODVM_AMI_ID is "ami-1"`, "want its region, us-east-1", `"vpc-01234567" in it: want an id such as subnet-`, "sg-01234567 is in it twice", `"large" in it: want an instance type`,
				`USE_PUBLIC_IP is "yes"`, "AWS_SPOT is", "AWS_TENANCY is", `ROOT_VOLUME_SIZE is "30Gi"`, "use https", "GUEST_OVERHEAD_MEMORY"}},
		{name: "default not allowed", file: awsFile + "PODVM_INSTANCE_TYPE=m6a.large\nPODVM_INSTANCE_TYPES=t3.small,t3.large\n",
			want: []string{`PODVM_INSTANCE_TYPE is "m6a.large" (`}},
		{name: "halves", file: awsFile + "AWS_SECRET_ACCESS_KEY=hush\nAWS_ROLE_ARN=arn:aws:iam::123456789012:role/r\n", want: []string{"AWS_SECRET_ACCESS_KEY (", "AWS_ROLE_ARN ("}},
		{name: "a token alone", file: awsFile + "AWS_SESSION_TOKEN=hush\n", want: []string{"AWS_SESSION_TOKEN ("}},
		{name: "the secret as the id", file: awsFile + "AWS_ACCESS_KEY_ID=hush/hush\nAWS_SECRET_ACCESS_KEY=a hush\n", want: []string{"AWS_ACCESS_KEY_ID is wrong (", "AWS_SECRET_ACCESS_KEY is wrong ("}},
		{name: "secrets on lines that are wrong", file: awsFile + "AWS_SECRET_ACCESS_KEY: hush=\nhush\nAWS_ENDPOINT_URL=https://me:hush@host\n",
			want: []string{"want AWS_SECRET_ACCESS_KEY=VALUE", "want KEY=VALUE", `AWS_ENDPOINT_URL is "https://[redacted]@host"`}},
		{name: "placeholders", file: awsFile + "AWS_REGION=<aws_region>\nAWS_SUBNET_ID=subnet-<id>\nAWS_SG_IDS=${SG}\nAWS_ACCESS_KEY_ID=<id>\nAWS_SECRET_ACCESS_KEY=<secret>\n",
			want: []string{`AWS_REGION is still the placeholder "<aws_region>"`, `placeholder "<id>" (`, `still has the placeholder "<id>"`, `no shell has replaced "${SG}"`, `AWS_SECRET_ACCESS_KEY is still the placeholder`}},
		{name: "slips in the file", file: awsFile + "AWS_SUBNET_IDS=x\nAWS_SECURITY_GROUP_IDS=x\nDISABLE_CVM=true\nPODVM_INSTANCE_SIZE=x\nAWS_FROBNICATE=1\nPROXY_TIMEOT=1m\nAWS_CA_BUNDLE=/x\n",
			want: []string{"AWS_SUBNET_IDS is not a setting; did you mean AWS_SUBNET_ID?", "did you mean AWS_SG_IDS?", "did you mean DISABLECVM?", "did you mean PODVM_INSTANCE_TYPE?", "AWS_FROBNICATE is not a setting; remove it", "did you mean PROXY_TIMEOUT?"}},
		{name: "slips in the environment", file: awsFile, env: []string{"AWS_REGOIN=us-east-1", "AWS_SECURITY_GROUP_ID=x", "DISABLE_CVM=true", "PROXY_TIMEOUTS=1", "aws_subnet_id=s"},
			want: []string{"AWS_REGOIN (the environment) is not a setting; did you mean AWS_REGION?", "did you mean AWS_SG_IDS?", "did you mean DISABLECVM?", "did you mean PROXY_TIMEOUT?", "aws_subnet_id (the environment) is not a setting; did you mean AWS_SUBNET_ID?"}},
		{name: "what others read", file: awsFile + "AWS_SG_IDS=sg-01234567\n", env: []string{"AWS_DEFAULT_REGION=us-east-1", "AWS_CONTAINER_CREDENTIALS_FULL_URI=x", "AWS_STS_REGIONAL_ENDPOINTS=regional",
			"AWS_EC2_METADATA_DISABLED=true", "AWS_ENDPOINT_URL_S3=x", "AWS_FROBNICATE=1", "AWS_SECURITY_GROUP_IDS=x", "NODE_NUM=x", "HOME=/", "AWS_REGOIN=", "AZURE_REGON=x"}},
		{name: "prices", file: awsFile + "INSTANCE_PRICES_FILE=/absent/prices\n", want: []string{`INSTANCE_PRICES_FILE is "/absent/prices" (`}},
		{name: "prices with two wrong lines", file: awsFile + "INSTANCE_PRICES_FILE=@K\n", want: []string{":1: want provider, region, type"}},
		{name: "another's keys", file: awsFile + "AZURE_REGION=East US\nAZURE_INSTANCE_SIZE=<size>\nAZURE_SPOTS=1\nSSH_USERNAME=root\nENABLE_SECURE_BOOT=maybe\nLOCAL_MEMORY=1\nGCP_ZONE=z\n"},
		{name: "no such provider", file: "CLOUD_PROVIDER=AWS\nPODVM_AMI_ID=x\nLOCAL_MEMORY=1\n", want: []string{`CLOUD_PROVIDER is "AWS"`}},
	} {
		t.Run(tc.name, tc.check)
	}
}

func TestAzureProblems(t *testing.T) {
	for _, tc := range []problem{
		{name: "nothing", file: "CLOUD_PROVIDER=azure\n", want: []string{"AZURE_SUBSCRIPTION_ID is not set", "AZURE_REGION is not set", "AZURE_RESOURCE_GROUP is not set", "AZURE_SUBNET_ID is not set", "AZURE_IMAGE_ID is not set"}},
		{name: "shapes", file: "CLOUD_PROVIDER=azure\nAZURE_SUBSCRIPTION_ID=mine\nAZURE_REGION=East US\nAZURE_RESOURCE_GROUP=/subscriptions/x\nAZURE_SUBNET_ID=default\nAZURE_IMAGE_ID=ubuntu\nAZURE_NSG_ID=n\n" +
			"AZURE_INSTANCE_SIZE=D2as_v5\nAZURE_ZONES=eastus-1\nAZURE_SECURITY_TYPE=Trusted\nSSH_USERNAME=admin\nAZURE_SSH_PUBLIC_KEY_FILE=/absent/key\nROOT_VOLUME_SIZE=5000\nAZURE_CLIENT_ID=me\n",
			want: []string{"AZURE_SUBSCRIPTION_ID is", "try eastus (", "AZURE_RESOURCE_GROUP is", "AZURE_SUBNET_ID is", "AZURE_IMAGE_ID is", "AZURE_NSG_ID is", "AZURE_INSTANCE_SIZE is",
				"AZURE_ZONES is", "AZURE_SECURITY_TYPE is", "SSH_USERNAME is", "AZURE_SSH_PUBLIC_KEY_FILE is", "ROOT_VOLUME_SIZE is", "AZURE_CLIENT_ID is"}},
		{name: "images", file: strings.ReplaceAll(azFile, sub+"Microsoft.Compute/galleries/a/images/i/versions/1.0.0", "/CommunityGalleries/cocopodvm-d0e4f35f/Images/podvm_image0/Versions/0.22.0")},
		{name: "a size with fewer cores", file: azFile + "AZURE_INSTANCE_SIZES=Standard_E4-2ds_v5,standard_nc4as_T4_v3\n"},
		{name: "a secret alone", file: azFile + "AZURE_CLIENT_SECRET=hush\n", want: []string{"AZURE_TENANT_ID is not set, and AZURE_CLIENT_SECRET", "AZURE_CLIENT_ID is not set, and AZURE_CLIENT_SECRET"}},
		{name: "a token alone", file: azFile, env: []string{"AZURE_FEDERATED_TOKEN_FILE=/t", "AZURE_CLIENT_ID=" + guid1}, want: []string{"AZURE_TENANT_ID is not set, and AZURE_FEDERATED_TOKEN_FILE (the environment)"}},
		{name: "confidential or not", file: azFile + "AZURE_SECURITY_TYPE=ConfidentialVM\nDISABLECVM=true\n", want: []string{`and DISABLECVM is "true"`}},
		{name: "not confidential or", file: azFile + "AZURE_SECURITY_TYPE=TrustedLaunch\nDISABLECVM=false\n", want: []string{`and DISABLECVM is "false"`}},
		{name: "trusted", file: azFile + "AZURE_SECURITY_TYPE=TrustedLaunch\nENABLE_SECURE_BOOT=true\n"},
		{name: "secure boot of nothing", file: azFile + "DISABLECVM=true\nENABLE_SECURE_BOOT=true\n", want: []string{"set AZURE_SECURITY_TYPE to TrustedLaunch"}},
		{name: "two subscriptions", file: strings.Replace(azFile, "AZURE_SUBSCRIPTION_ID=0", "AZURE_SUBSCRIPTION_ID=1", 1), want: []string{"AZURE_SUBNET_ID ("}},
		{name: "default not allowed", file: azFile + "AZURE_INSTANCE_SIZE=Standard_D2as_v5\nAZURE_INSTANCE_SIZES=Standard_D4as_v5\n", want: []string{`which is not in AZURE_INSTANCE_SIZES (`}},
		{name: "burstable on the spot market", file: azFile + "AZURE_INSTANCE_SIZE=Standard_B2als_v2\nAZURE_SPOT=only\n", want: []string{`AZURE_SPOT is "only" (`}},
		{name: "burstable among others", file: azFile + "AZURE_INSTANCE_SIZES=Standard_B2als_v2,Standard_D2as_v5\nAZURE_SPOT=only\n"},
		{name: "default in other letters", file: azFile + "AZURE_INSTANCE_SIZE=standard_d2as_v5\nAZURE_INSTANCE_SIZES=Standard_D2as_v5\n"},
		{name: "slips", file: azFile + "AZURE_LOCATION=eastus\nAZURE_INSTANCE_TYPE=x\n", env: []string{"AZURE_CLIENT_SECRETS=hush", "AZURE_POD_IDENTITY_AUTHORITY_HOST=x", "AZURE_CONFIG_DIR=/x"},
			want: []string{"did you mean AZURE_REGION?", "did you mean AZURE_INSTANCE_SIZE?", "did you mean AZURE_CLIENT_SECRET?"}},
		{name: "placeholder within", file: strings.ReplaceAll(azFile, "resourceGroups/g/", "resourceGroups/<group>/"), want: []string{"AZURE_SUBNET_ID is", "AZURE_IMAGE_ID is"}},
	} {
		t.Run(tc.name, tc.check)
	}
}

func TestDefaultOfList(t *testing.T) {
	for list, want := range map[string]string{"t3.small,m6a.large": "m6a.large", "t3.small,t3.large": "t3.small", "": "m6a.large"} {
		if c, err := Load(write(t, awsFile), []string{"PODVM_INSTANCE_TYPES=" + list}, Flags{}); err != nil || c.AWS.InstanceType != want {
			t.Errorf("of %q: %v, %v; want %s", list, c, err, want)
		}
	}
}

func TestLaunchTemplate(t *testing.T) {
	for env, want := range map[string]string{"": "", "USE_PODVM_LAUNCHTEMPLATE=true": "kata", "PODVM_LAUNCHTEMPLATE_NAME=x": "x",
		"USE_PODVM_LAUNCHTEMPLATE=true PODVM_LAUNCHTEMPLATE_NAME=x": "x", "USE_PODVM_LAUNCHTEMPLATE=false PODVM_LAUNCHTEMPLATE_NAME=x": ""} {
		if c, err := Load(write(t, awsFile), strings.Fields(env), Flags{}); err != nil || c.AWS.LaunchTemplate != want {
			t.Errorf("%q: %v; want %q", env, err, want)
		}
	}
}

func TestReload(t *testing.T) {
	path := write(t, awsFile+"AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE\nAWS_SECRET_ACCESS_KEY=old\n")
	c, err := Load(path, []string{"AWS_REGION=us-east-2"}, Flags{LogLevel: "debug"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(awsFile+"AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE\nAWS_SECRET_ACCESS_KEY=new\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := c.Reload()
	if err != nil || again.AWS.SecretAccessKey != "new" || again.AWS.Region != "us-east-2" || again.LogLevel != slog.LevelDebug || c.AWS.SecretAccessKey != "old" {
		t.Errorf("%v, %v", again, err)
	}
	if err := os.WriteFile(path, []byte("CLOUD_PROVIDER=aws\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Reload(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a file that has become wrong: %v", err)
	}
}

// TestSlipsAreNotOverzealous: no setting of any provider, and no variable of a library,
// is taken for another setting's misspelling.
func TestSlipsAreNotOverzealous(t *testing.T) {
	nothing := func(string) bool { return false }
	for _, provider := range Providers {
		for _, k := range allKeys {
			if s := slip(k.name, provider, nothing); s != "" {
				t.Errorf("%s: %s is taken for %s", provider, k.name, s)
			}
		}
		for _, n := range slices.Concat(sdkNames, otherNames, []string{"PATH", "KUBERNETES_SERVICE_HOST", "HOSTNAME", "POD_NAME", "GOFLAGS", "INVOCATION_ID", "JOURNAL_STREAM", "HTTPS_PROXY", "GLOG_LEVEL", "STATE_DIRECTORY", "MODE_NAME"}) {
			if s := slip(strings.ReplaceAll(n, "*", "X"), provider, nothing); s != "" {
				t.Errorf("%s: %s is taken for %s", provider, n, s)
			}
		}
	}
	for wrong, right := range misnomers {
		if !has(allKeys, right) || has(allKeys, wrong) {
			t.Errorf("%s for %s", wrong, right)
		}
	}
}

// TestLoadAccount: before there is an image, and whatever provider is chosen.
func TestLoadAccount(t *testing.T) {
	env := []string{"CLOUD_PROVIDER=aws", "AZURE_IMAGE_ID=<azure_image_id>", "AZURE_REGION=westeurope", "NODE_NAME=n"}
	c, err := LoadAccount("", env, ProviderAzure)
	if err != nil || c.Provider != ProviderAzure || c.Azure.Region != "westeurope" || c.Azure.ImageID != "" {
		t.Fatalf("%+v, %v", c, err)
	}
	if again, err := c.Reload(); err != nil || again.Azure.Region != "westeurope" {
		t.Errorf("reload: %v", err)
	}
	if _, err := LoadAccount("", append(env, "AZURE_REGION=East US"), ProviderAzure); err == nil || !strings.Contains(err.Error(), "try eastus") {
		t.Errorf("a wrong region: %v", err)
	}
	if _, err := LoadAccount("", append(env, "AZURE_CLIENT_SECRET=x"), ProviderAzure); err == nil || !strings.Contains(err.Error(), "AZURE_TENANT_ID is not set") {
		t.Errorf("half a credential: %v", err)
	}
	if _, err := Load("", env, Flags{}); err == nil || !strings.Contains(err.Error(), "PODVM_AMI_ID is not set") {
		t.Errorf("the adaptor needs an image: %v", err)
	}
}
