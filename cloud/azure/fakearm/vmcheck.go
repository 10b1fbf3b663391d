// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"cmp"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// plan is what a request for a machine comes to.
type plan struct {
	size  Size
	zone  string
	spot  bool
	image *Image
}

const (
	maxUserData   = 64 << 10   // bytes before base64 (API reference: userData)
	maxCustomData = 64<<10 - 1 // bytes before base64 (API reference: osProfile.customData)
	maxHostname   = 64         // characters, Linux (API reference: osProfile.computerName)
	maxVMName     = 80         // characters of the resource; Linux machines get 64 from computerName
	sshPath       = "/home/%s/.ssh/authorized_keys"
)

var (
	vmNameRule   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`)
	hostnameRule = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$`)
	userRule     = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	// forbiddenUsers cannot be an administrator's name (learn.microsoft.com, "FAQ
	// about Linux virtual machines: what are the username requirements").
	forbiddenUsers = []string{"1", "123", "a", "actuser", "adm", "admin", "admin1", "admin2", "administrator", "aspnet", "backup", "console", "david",
		"guest", "john", "owner", "root", "server", "sql", "support_388945a0", "support", "sys", "test", "test1", "test2", "test3", "user", "user1",
		"user2", "user3", "user4", "user5", "video"}
)

func badUserData() *apiError {
	return badRequest("InvalidParameter", "userData", "User data must be in Base64 encoding and with a maximum length of 87380 characters.")
}

func invalid(target, format string, args ...any) *apiError {
	return badRequest("InvalidParameter", target, format, args...)
}

// checkVM is everything that a creation is refused for at once.
func (s *Server) checkVM(c *call, old *resource) (*plan, *apiError) {
	name := c.path.names[0]
	if len(name) > maxVMName || !vmNameRule.MatchString(name) {
		return nil, invalid("resourceName", "The entity name 'resourceName' is invalid according to its validation rule: ^[^_\\W][\\w-._]{0,79}(?<![-.])$.")
	}
	p := &plan{spot: text(c.body, "properties.priority") == "Spot"}
	for _, check := range []func(*call, *plan, *resource) *apiError{
		s.checkSize, s.checkPriority, s.checkImage, s.checkOSDisk, s.checkSecurity, checkOSProfile, checkData, s.checkNetwork,
	} {
		if err := check(c, p, old); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (s *Server) checkSize(c *call, p *plan, _ *resource) *apiError {
	name := text(c.body, "properties.hardwareProfile.vmSize")
	if name == "" {
		return invalid("vmSize", "Required parameter 'hardwareProfile.vmSize' is missing (null).")
	}
	z, ok := s.sizes[strings.ToLower(name)]
	if !ok {
		return invalid("vmSize", "The value '%s' provided for the VM size is not valid. The valid sizes in the current region are: %s. Find out more on the available VM sizes in each region at https://aka.ms/azure-regions.",
			name, strings.Join(s.sizeNames(), ","))
	}
	p.size = z
	zones := list(c.body, "zones")
	if len(zones) > 1 {
		return badRequest("InvalidRequestFormat", "zones", "A virtual machine can be in one zone only; got %d.", len(zones))
	}
	if len(zones) == 1 {
		p.zone, _ = zones[0].(string)
		if !slices.Contains([]string{"1", "2", "3"}, p.zone) {
			return badRequest("InvalidAvailabilityZone", "zones", "The zone(s) '%s' for resource '%s' is not supported. The supported zones for location '%s' are '1,2,3'",
				p.zone, c.path.id(s), s.cfg.Region)
		}
	}
	where := ""
	if p.zone != "" {
		where = " zones '" + p.zone + "'"
	}
	if z.Restricted || p.zone != "" && (!slices.Contains(z.Zones, p.zone) || slices.Contains(z.RestrictedZones, p.zone)) {
		return conflict("SkuNotAvailable", "vmSize", "The requested size for resource '%s' is currently not available in location '%s'%s for subscription '%s'. "+
			"Please try another size or deploy to a different location or zones. See https://aka.ms/azureskunotavailable for details.", c.path.id(s), s.cfg.Region, where, s.cfg.Subscription)
	}
	return nil
}

func (s *Server) checkPriority(c *call, p *plan, _ *resource) *apiError {
	if !p.spot {
		if at(c.body, "properties.evictionPolicy") != nil {
			return invalid("evictionPolicy", "Eviction policy can be set only on Azure Spot Virtual Machines.")
		}
		if v := at(c.body, "properties.billingProfile.maxPrice"); v != nil {
			return invalid("billingProfile", "Max price can be set only on Azure Spot Virtual Machines.")
		}
		return nil
	}
	if !p.size.Spot {
		return badRequest("BadRequest", "priority", "The VM size '%s' is not supported for Azure Spot Virtual Machines.", p.size.Name)
	}
	if v := at(c.body, "properties.billingProfile.maxPrice"); v != nil {
		if f := v.(float64); f != -1 && f <= 0.00001 {
			return invalid("billingProfile.maxPrice", "Max price must be -1 or greater than $0.00001.")
		}
	}
	if object(c.body, "properties.availabilitySet") != nil {
		return badRequest("BadRequest", "availabilitySet", "Azure Spot Virtual Machine is not supported in Availability Set.")
	}
	return nil
}

func (s *Server) checkImage(c *call, p *plan, _ *resource) *apiError {
	ref := object(c.body, "properties.storageProfile.imageReference")
	create := text(c.body, "properties.storageProfile.osDisk.createOption")
	if create == "Attach" {
		id := text(c.body, "properties.storageProfile.osDisk.managedDisk.id")
		d := s.resources[key(id)]
		switch {
		case ref != nil:
			return invalid("imageReference", "Parameter 'imageReference' is not allowed.")
		case d == nil:
			return badRequest("ResourceNotFound", "managedDisk", "The Resource '%s' was not found.", id)
		case text(d.doc, "managedBy") != "":
			return conflict("ConflictingUserInput", "managedDisk", "Disk '%s' cannot be attached as the disk is already owned by VM '%s'.", d.name, text(d.doc, "managedBy"))
		case text(c.body, "properties.storageProfile.osDisk.osType") == "":
			return invalid("osDisk.osType", "Required parameter 'osDisk.osType' is missing (null).")
		}
		p.image = &Image{ID: id, State: "Specialized", Generation: "V2", Path: d.disk.rawPath(), SecurityType: text(d.doc, "properties.securityProfile.securityType")}
		return nil
	}
	if create != "FromImage" {
		return invalid("osDisk.createOption", "The value '%s' of parameter 'osDisk.createOption' is not allowed for an OS disk.", create)
	}
	var ids []string
	for _, n := range []string{"id", "sharedGalleryImageId", "communityGalleryImageId"} {
		if v := text(ref, n); v != "" {
			ids = append(ids, v)
		}
	}
	if text(ref, "publisher") != "" || text(ref, "offer") != "" || text(ref, "sku") != "" {
		if len(ids) > 0 {
			return invalid("imageReference", "The imageReference has both an id and a publisher.")
		}
		return &apiError{status: http.StatusNotFound, code: "PlatformImageNotFound", target: "imageReference", message: fmt.Sprintf("The platform image '%s:%s:%s:%s' is not available. "+
			"Verify that all fields in the storage profile are correct.", text(ref, "publisher"), text(ref, "offer"), text(ref, "sku"), text(ref, "version"))}
	}
	if len(ids) != 1 {
		return invalid("imageReference", "Required parameter 'imageReference' is missing (null), or names %d images.", len(ids))
	}
	if g := strings.HasPrefix(key(ids[0]), "/communitygalleries/"); g != (text(ref, "communityGalleryImageId") != "") {
		return invalid("imageReference.id", "The image '%s' is one of a community gallery: it goes into communityGalleryImageId, and no other does.", ids[0])
	}
	if g := strings.HasPrefix(key(ids[0]), "/sharedgalleries/"); g != (text(ref, "sharedGalleryImageId") != "") {
		return invalid("imageReference.id", "The image '%s' is one of a shared gallery: it goes into sharedGalleryImageId, and no other does.", ids[0])
	}
	img, err := s.imageOf(ids[0])
	if err != nil {
		return err
	}
	if strings.HasPrefix(key(ids[0]), "/subscriptions/") {
		action := "Microsoft.Compute/images/read"
		if strings.Contains(key(ids[0]), "/galleries/") {
			action = "Microsoft.Compute/galleries/images/versions/read"
		}
		if err := c.linked(action, ids[0], "Microsoft.Compute/virtualMachines/write"); err != nil {
			return err
		}
	}
	if cmp.Or(img.Arch, "x64") != p.size.Arch {
		return badRequest("BadRequest", "", "Cannot create a VM of size '%s' because this VM size only supports a CPU Architecture of '%s', but an image or disk with CPU Architecture '%s' was given.", p.size.Name, p.size.Arch, cmp.Or(img.Arch, "x64"))
	}
	if gen := cmp.Or(img.Generation, "V2"); !slices.Contains(p.size.Generations, gen) {
		return badRequest("BadRequest", "", "The selected VM size '%s' cannot boot Hypervisor Generation '%s'. If this was a Create operation please check that the Hypervisor Generation of the Image matches the Hypervisor Generation of the selected VM Size.", p.size.Name, gen[1:])
	}
	p.image = img
	return nil
}

func (s *Server) checkOSDisk(c *call, p *plan, _ *resource) *apiError {
	od := object(c.body, "properties.storageProfile.osDisk")
	if err := c.linked("Microsoft.Compute/disks/write", c.path.id(s), "Microsoft.Compute/virtualMachines/write"); err != nil {
		return err
	}
	if n := number(od, "diskSizeGB"); at(od, "diskSizeGB") != nil && (n < 1 || n > 4095) {
		return invalid("osDisk.diskSizeGB", "The value of parameter 'osDisk.diskSizeGB' is out of range. Value '%g' must be between '1' and '4095', inclusive.", n)
	} else if p.image != nil && n != 0 && int(n) < p.image.SizeGB {
		return badRequest("ResizeDiskError", "osDisk.diskSizeGB", "The specified disk size %g GB is smaller than the size of the corresponding disk in the VM image: %d GB. This is not allowed.", n, p.image.SizeGB)
	}
	if strings.Contains(text(od, "managedDisk.storageAccountType"), "Premium") && !p.size.Premium {
		return invalid("osDisk.managedDisk.storageAccountType", "Requested operation cannot be performed because the VM size %s does not support the storage account type %s of disk. Consider updating the VM to a size that supports Premium storage.",
			p.size.Name, text(od, "managedDisk.storageAccountType"))
	}
	if name := text(od, "name"); name != "" {
		if d := s.resources[key(s.cfg.id(c.path.group, "Microsoft.Compute/disks", name))]; d != nil && text(od, "createOption") == "FromImage" && !strings.EqualFold(text(d.doc, "managedBy"), c.path.id(s)) {
			return conflict("ConflictingUserInput", "osDisk.name", "Disk %s already exists in resource group %s. Only CreateOption.Attach is supported.", name, strings.ToUpper(c.path.group))
		}
	}
	if object(od, "diffDiskSettings") == nil {
		return nil
	}
	switch {
	case text(od, "diffDiskSettings.option") != "Local":
		return invalid("diffDiskSettings.option", "Required parameter 'diffDiskSettings.option' is missing (null).")
	case text(od, "caching") != "ReadOnly":
		return invalid("osDisk.caching", "OS disk caching of an Ephemeral OS disk must be ReadOnly.")
	case !p.size.Ephemeral():
		return conflict("OperationNotAllowed", "diffDiskSettings", "OS disk of Ephemeral VM is not supported for VM size %s.", p.size.Name)
	case text(od, "deleteOption") == "Detach":
		return invalid("osDisk.deleteOption", "The delete option of an Ephemeral OS disk can only be Delete.")
	case p.spot && text(c.body, "properties.evictionPolicy") != "Delete":
		return invalid("evictionPolicy", "An Azure Spot Virtual Machine with an Ephemeral OS disk needs the eviction policy Delete.")
	case strings.Contains(text(od, "managedDisk.storageAccountType"), "Premium"):
		return invalid("osDisk.managedDisk.storageAccountType", "Ephemeral OS disk must have storage account type Standard_LRS or StandardSSD_LRS.")
	}
	where, room := "CacheDisk", p.size.CacheGB
	switch pl := text(od, "diffDiskSettings.placement"); {
	case pl == "ResourceDisk" || pl == "" && room == 0:
		where, room = "ResourceDisk", p.size.TempGB
	case pl == "NvmeDisk":
		where, room = pl, p.size.NvmeGB
	}
	need := int(number(od, "diskSizeGB"))
	if need == 0 {
		need = max(p.image.SizeGB, 1)
	}
	if need > room {
		return conflict("OperationNotAllowed", "diffDiskSettings", "OS disk of Ephemeral VM with size greater than %d GB is not allowed for VM size %s when the DiffDiskPlacement is %s.", room, p.size.Name, where)
	}
	return nil
}

// checkSecurity: the rules of trusted launch and of confidential machines
// (learn.microsoft.com, "Azure Confidential VM options", "Trusted launch", and the API
// reference of securityProfile and managedDisk.securityProfile).
func (s *Server) checkSecurity(c *call, p *plan, _ *resource) *apiError {
	sp := object(c.body, "properties.securityProfile")
	kind := text(sp, "securityType")
	enc := text(c.body, "properties.storageProfile.osDisk.managedDisk.securityProfile.securityEncryptionType")
	vtpm, secure := flag(sp, "uefiSettings.vTpmEnabled"), flag(sp, "uefiSettings.secureBootEnabled")
	shown := cmp.Or(kind, "<NULL>")
	if object(sp, "uefiSettings") != nil && kind != "TrustedLaunch" && kind != "ConfidentialVM" {
		return invalid("securityProfile.uefiSettings", "UefiSettings cannot be set: it is supported with security type TrustedLaunch or ConfidentialVM only.")
	}
	if enc != "" && kind != "ConfidentialVM" {
		return invalid("osDisk.managedDisk.securityProfile", "managedDisk.securityProfile.securityEncryptionType can be set only for a VM with securityType ConfidentialVM.")
	}
	if p.size.Confidential != "" != (kind == "ConfidentialVM") {
		return badRequest("BadRequest", "", "The VM size '%s' is not supported for creation of VMs and Virtual Machine Scale Set with '%s' security type.", p.size.Name, shown)
	}
	if flag(sp, "encryptionAtHost") && !p.size.HostEncryption {
		return invalid("securityProfile.encryptionAtHost", "The property 'securityProfile.encryptionAtHost' is not valid because the VM size %s does not support it.", p.size.Name)
	}
	if err := imageSecurity(p.image, kind); err != nil {
		return err
	}
	if kind == "TrustedLaunch" && (cmp.Or(p.image.Generation, "V2") != "V2" || p.size.NoTrustedLaunch) {
		return badRequest("BadRequest", "", "Use of TrustedLaunch setting is not supported for the provided image or VM size. Please select Trusted Launch Supported Gen2 OS Image and VM size.")
	}
	if kind != "ConfidentialVM" {
		return nil
	}
	ephemeral := object(c.body, "properties.storageProfile.osDisk.diffDiskSettings") != nil
	switch {
	case enc == "":
		return invalid("osDisk.managedDisk.securityProfile", "Required parameter 'managedDisk.securityProfile.securityEncryptionType' is missing (null): a VM with securityType ConfidentialVM needs it.")
	case object(sp, "uefiSettings") == nil || !vtpm:
		return invalid("securityProfile.uefiSettings.vTpmEnabled", "vTpmEnabled must be true for a VM with securityType ConfidentialVM.")
	case enc == "DiskWithVMGuestState" && !secure:
		return invalid("securityProfile.uefiSettings.secureBootEnabled", "secureBootEnabled must be true with securityEncryptionType DiskWithVMGuestState.")
	case enc == "DiskWithVMGuestState" && flag(sp, "encryptionAtHost"):
		return invalid("securityProfile.encryptionAtHost", "encryptionAtHost cannot be enabled with securityEncryptionType DiskWithVMGuestState.")
	case ephemeral && enc == "DiskWithVMGuestState":
		return invalid("osDisk.managedDisk.securityProfile", "securityEncryptionType DiskWithVMGuestState is not supported with an Ephemeral OS disk.")
	case enc == "NonPersistedTPM" && p.size.Confidential != "TDX":
		return invalid("osDisk.managedDisk.securityProfile", "securityEncryptionType NonPersistedTPM is not supported for VM size %s.", p.size.Name)
	}
	return nil
}

// imageSecurity tells whether an image definition's SecurityType lets a machine be of
// a kind.
func imageSecurity(img *Image, kind string) *apiError {
	allowed := map[string][]string{
		"":                        {"", "Standard"},
		"TrustedLaunch":           {"TrustedLaunch"},
		"TrustedLaunchSupported":  {"", "Standard", "TrustedLaunch"},
		"ConfidentialVM":          {"ConfidentialVM"},
		"ConfidentialVmSupported": {"", "Standard", "ConfidentialVM"},
		"TrustedLaunchAndConfidentialVmSupported": {"", "Standard", "TrustedLaunch", "ConfidentialVM"},
	}[img.SecurityType]
	if slices.Contains(allowed, kind) {
		return nil
	}
	if img.SecurityType == "ConfidentialVM" || img.SecurityType == "TrustedLaunch" {
		return badRequest("BadRequest", "", "The provided gallery image only supports creation of VMs and VM Scale Sets with '%s' security type.", img.SecurityType)
	}
	return badRequest("BadRequest", "", "Security type '%s' is not supported by the provided image: its definition's feature SecurityType is '%s'.", kind, cmp.Or(img.SecurityType, "Standard"))
}

// checkOSProfile: who may log in.
func checkOSProfile(c *call, p *plan, _ *resource) *apiError {
	op := object(c.body, "properties.osProfile")
	if p.image.State == "Specialized" {
		if op != nil {
			return invalid("osProfile", "Parameter 'osProfile' is not allowed.")
		}
		return nil
	}
	if op == nil {
		return invalid("osProfile", "Required parameter 'osProfile' is missing (null).")
	}
	name, user, password := text(op, "computerName"), text(op, "adminUsername"), text(op, "adminPassword")
	switch {
	case name == "":
		return invalid("osProfile.computerName", "Required parameter 'osProfile.computerName' is missing (null).")
	case len(name) > maxHostname || !hostnameRule.MatchString(name):
		return invalid("osProfile.computerName", "Linux host name cannot exceed 64 characters in length or contain the following characters: ` ~ ! @ # $ %% ^ & * ( ) = + _ [ ] { } \\ | ; : . ' \" , < > / ?.")
	case user == "":
		return invalid("adminUsername", "Required parameter 'osProfile.adminUsername' is missing (null).")
	case slices.Contains(forbiddenUsers, strings.ToLower(user)) || !userRule.MatchString(user):
		return invalid("adminUsername", "The Admin Username specified is not allowed.")
	case object(op, "windowsConfiguration") != nil:
		return invalid("osProfile.windowsConfiguration", "Parameter 'windowsConfiguration' is not allowed.")
	}
	lc := object(op, "linuxConfiguration")
	keys := list(lc, "ssh.publicKeys")
	switch {
	case flag(lc, "disablePasswordAuthentication") && password != "":
		return invalid("adminPassword", "Parameter 'adminPassword' is not allowed.")
	case password == "" && len(keys) == 0:
		return invalid("linuxConfiguration", "Authentication using either SSH or by user name and password must be enabled in Linux profile.")
	case password == "" && !flag(lc, "disablePasswordAuthentication"):
		return invalid("adminPassword", "Required parameter 'adminPassword' is missing (null).")
	case password != "" && !goodPassword(password):
		return invalid("adminPassword", "The supplied password must be between 6-72 characters long and must satisfy at least 3 of password complexity requirements from the following: "+
			"Contains an uppercase character, Contains a lowercase character, Contains a numeric digit, Contains a special character, Control characters are not allowed")
	}
	for _, k := range keys {
		if want := fmt.Sprintf(sshPath, user); text(k, "path") != want {
			return invalid("linuxConfiguration.ssh.publicKeys.path", "Destination path for SSH public keys is currently limited to its default value %s due to a known issue in Linux provisioning agent.", want)
		}
		if !goodKey(text(k, "keyData")) {
			return invalid("linuxConfiguration.ssh.publicKeys.keyData", "The value of parameter linuxConfiguration.ssh.publicKeys.keyData is invalid.")
		}
	}
	return nil
}

func goodPassword(p string) bool {
	var upper, lower, digit, special int
	for _, r := range p {
		switch {
		case unicode.IsControl(r):
			return false
		case unicode.IsUpper(r):
			upper = 1
		case unicode.IsLower(r):
			lower = 1
		case unicode.IsDigit(r):
			digit = 1
		default:
			special = 1
		}
	}
	return len(p) >= 6 && len(p) <= 72 && upper+lower+digit+special >= 3
}

// goodKey: ssh-rsa of at least 2048 bits, or ssh-ed25519, in OpenSSH's one-line form.
func goodKey(line string) bool {
	f := strings.Fields(line)
	if len(f) < 2 || f[0] != "ssh-rsa" && f[0] != "ssh-ed25519" {
		return false
	}
	b, err := base64.StdEncoding.DecodeString(f[1])
	if err != nil {
		return false
	}
	var parts [][]byte
	for len(b) >= 4 {
		n := binary.BigEndian.Uint32(b)
		if uint64(len(b)-4) < uint64(n) {
			return false
		}
		parts, b = append(parts, b[4:4+n]), b[4+n:]
	}
	switch {
	case len(b) > 0 || len(parts) == 0 || string(parts[0]) != f[0]:
		return false
	case f[0] == "ssh-rsa":
		return len(parts) == 3 && len(parts[2]) >= 256
	}
	return len(parts) == 2 && len(parts[1]) == 32
}

// checkData: what is handed to the guest.
func checkData(c *call, p *plan, _ *resource) *apiError {
	if u := text(c.body, "properties.userData"); u != "" {
		if n, err := base64Bytes("userData", u); err != nil || n > maxUserData {
			return badUserData()
		}
	}
	if d := text(c.body, "properties.osProfile.customData"); d != "" {
		if n, err := base64Bytes("customData", d); err != nil || n > maxCustomData {
			return invalid("customData", "Custom data in OSProfile must be in Base64 encoding and with a maximum length of 87380 characters.")
		}
	}
	return nil
}
